"""The plan of a sweep: blocks without a plan never count, after any failure or kill, and a stall is named."""

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import tiny_sweep
from kills import TIMEOUT_S
from tiny_sweep import NUM

import jobs.runtime.sweep
import jobs.runtime.watchdog
from jobs.runtime.blocks import Blocks
from jobs.runtime.demo_keeping import remove_other
from jobs.runtime.ray_private import cpus
from jobs.runtime.watchdog import Watchdog
from mmcore.errors import InputError
from mmcore.storage import Storage

pytest_plugins = ("sweep_fixtures",)


def test_blocks_without_a_plan_are_refused(sweep, run_folder, tmp_path):
    """Such blocks are of unknown images. They must not count as done for the requested images."""
    sweep()
    (tmp_path / "out" / "sweep.json").unlink()
    calls = tiny_sweep.calls(run_folder)
    for changes in ({}, {"seed": 1}, {"dry_run": True}):
        with pytest.raises(InputError, match=r"out/manifest: holds 3 blocks, and sweep.json beside it, .* or remove "):
            sweep(**changes)
    assert tiny_sweep.calls(run_folder) == calls
    assert not (tmp_path / "out" / "sweep.json").exists()


def test_a_worker_that_outlives_a_failure_commits_to_a_plan(sweep, run_folder, tmp_path, monkeypatch):
    workers = []

    def one_fails(blocks: Blocks, todo: list[int], actors: dict[str, Any], num_workers: int) -> Iterator[Any]:
        workers.append((actors["fn"](**actors["fn_constructor_kwargs"]), blocks.items[todo[1]]))
        yield {"block": 0, "num_rows": 0, "load_s": 0.0, "error": "the other worker's disk is full"}

    with monkeypatch.context() as patch:
        patch.setattr(jobs.runtime.sweep, "_results", one_fails)
        with pytest.raises(InputError, match="disk is full"):
            sweep()
    ((worker, item),) = workers
    assert worker({"block": item["block"], "rows": item["columns"]})["error"] == ""
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        sweep(seed=1)
    sweep()
    tiny_sweep.check_complete(Storage(str(tmp_path / "out")), NUM)
    assert len(tiny_sweep.calls(run_folder)) == 3


def test_a_removal_that_is_killed_leaves_no_block_that_lies(sweep, tmp_path, monkeypatch):
    """The demo removes a sweep of other settings, and is killed before each of its deletions."""

    def killed_before(number: int) -> bool:
        left = number

        def counted(method: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any, **keywords: Any) -> None:
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                method(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            for name in ("delete", "delete_tree"):
                patch.setattr(Storage, name, counted(getattr(Storage, name)))
            try:
                remove_other(Storage(str(tmp_path / "out")), {"steps": 99}, "manifest")
            except KeyboardInterrupt:
                return True
        return False

    out = tmp_path / "out"
    number = 0
    sweep()
    while killed_before(number):
        keys = [row for path in (out / "manifest").glob("*.parquet") for row in pq.read_table(path)["key"].to_pylist()]
        assert not keys or ((out / "sweep.json").exists() and all((out / key).exists() for key in keys))
        # Blocks of the old settings must neither block new ones nor count as done.
        assert (out / "sweep.json").exists() or not (out / "images").exists()
        sweep()
        assert json.loads((out / "summary.json").read_text())["num_images"] == NUM
        tiny_sweep.check_complete(Storage(str(out)), NUM)
        number += 1
    assert number >= 4
    assert not out.exists()


class Clock(threading.Event):
    """The clock of a sweep and the event of its watchdog. Seconds pass only in `advance`."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.wakes_at = 0.0, -1.0
        self.turn = threading.Condition()

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def wait(self, timeout: float | None = None) -> bool:
        with self.turn:
            self.wakes_at = self.now + (timeout or 0.0)
            self.turn.notify_all()
            self.turn.wait_for(lambda: self.is_set() or self.now >= self.wakes_at)
        return self.is_set()

    def set(self) -> None:
        with self.turn:
            super().set()
            self.turn.notify_all()

    def advance(self, seconds: float) -> None:
        """Returns when the watchdog has seen the new time and waits again."""
        with self.turn:
            self.now += seconds
            self.turn.notify_all()
            assert self.turn.wait_for(lambda: self.wakes_at > self.now, timeout=TIMEOUT_S), "the watchdog hangs"


def test_a_stall_amid_long_blocks_is_named_in_time(sweep, monkeypatch, capsys):
    """Three quarters of the limit pass, however long earlier blocks took. Then the sweep stalls until it is named."""
    limit_s, clock = 4.0, Clock()

    class OnThatClock(Watchdog):
        def __init__(self, what: str, stall_timeout_s: float | None = None) -> None:
            super().__init__(what, stall_timeout_s, limit_s)
            self._stop = clock

    results = jobs.runtime.sweep._results

    def slow(*arguments: Any, **keywords: Any) -> Iterator[dict[str, Any]]:
        assert f"generate: 0 of {NUM} images, 0:00 elapsed, starting the workers\n" in capsys.readouterr().err
        rows = results(*arguments, **keywords)
        yield next(rows)
        clock.advance(0.75 * limit_s)
        yield next(rows)
        clock.advance(0.75 * limit_s)
        assert "no progress" not in capsys.readouterr().err
        clock.advance(0.25 * limit_s)
        yield from rows

    for module in (jobs.runtime.watchdog, jobs.runtime.sweep):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(jobs.runtime.watchdog, "QUERY_TIMEOUT_S", TIMEOUT_S)
    monkeypatch.setattr(jobs.runtime.watchdog, "describe_waiting", lambda: jobs.runtime.watchdog.ALL_PLACED)
    monkeypatch.setattr(jobs.runtime.sweep, "Watchdog", OnThatClock)
    monkeypatch.setattr(jobs.runtime.sweep, "_results", slow)
    sweep()
    told = [line for line in capsys.readouterr().err.splitlines() if "no progress" in line]
    waited = "waiting: generate: no progress for 4 s (earlier waits took up to 3 s): "
    assert told == [waited + jobs.runtime.watchdog.ALL_PLACED]


def test_a_cluster_without_workers_yet_has_room_for_one(monkeypatch):
    """An autoscaler's head without CPUs, and a machine that left."""
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"memory": 1.0}},
        {"NodeID": "b", "Alive": False, "Resources": {"CPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(jobs.runtime.sweep, "max_gpus", lambda: 0)
    monkeypatch.setattr(ray, "get", lambda tasks: tasks)
    assert jobs.runtime.sweep.num_workers_and_gpus("cpu") == (1, 0.0)
    assert jobs.runtime.sweep.num_workers_and_gpus() == (1, 0.0)
    assert jobs.runtime.sweep.machine_cpus("cpu") == [cpus()]


def test_each_machine_tells_its_own_cpus(ray_local):
    assert jobs.runtime.sweep.machine_cpus("cpu") == [cpus()]
    assert jobs.runtime.sweep.num_workers_and_gpus("cpu") == (1, 0.0)


def test_all_of_a_worker_s_computing_is_on_one_thread(sweep, monkeypatch):
    """Each further thread has its own OpenMP team, which slows all of them down. Writing runs in parallel."""
    seen: dict[str, set[int]] = {"compute": set(), "write": set()}

    def watched(owner: type, name: str, kind: str) -> None:
        method = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            seen[kind].add(threading.get_ident())
            return method(self, *args)

        monkeypatch.setattr(owner, name, call)

    watched(tiny_sweep.TinyGenerator, "load", "compute")
    watched(tiny_sweep.TinyWorker, "generate", "compute")
    watched(tiny_sweep.TinyWorker, "write", "write")
    sweep()
    assert len(seen["compute"]) == 1
    assert seen["write"]
    assert not seen["compute"] & seen["write"]
