"""Killed runs and failing storage: the result equals that of a run without interruption."""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import free_port
from gate import AHEAD, Gate
from kills import (
    TIMEOUT_S,
    TRAIN_WORKER,
    committed_step,
    kill_with_all_it_started,
    moments,
    rows_until,
    wait_for_starts,
    wait_for_step,
    wait_for_workers,
    wait_until,
    wait_until_gone,
    workers,
)
from small_disk import small_disk

from jobs.train_resnet_captioner import main
from mmcore import checkpoint
from mmcore.errors import InputError
from mmcore.storage import Storage

# It waits at a gate before each report, in the folder of the variable GATE.
JOB = ["tests/gated_job.py", "train_resnet_captioner"]
# 40 steps in 8 epochs. With dropout, a resume with lost random states would be visible.
FLAGS = [
    "--variant", "smoke", "--dataset", "tiny", "--split", "split", "--image-size", "32", "--num-epochs", "8",
    "--max-steps", "40", "--batch-size", "8", "--checkpoint-every-steps", "2", "--log-every-steps", "1",
    "--dropout", "0.1", "--num-threads", "1",
]  # fmt: skip
NUM_STEPS = 40
NUM_WORKERS = 2


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """One storage for all runs here, so that its images are encoded once."""
    storage = Storage(str(tmp_path_factory.mktemp("storage")))
    tiny.write_dataset(storage)
    return storage


_finished: dict[str, dict[str, Any]] = {}


@pytest.fixture
def reference(call_job: Callable[..., Any], storage: Storage) -> dict[str, Any]:
    """The result of a run without interruption."""
    if storage.uri not in _finished:
        call_job(main, *FLAGS, "--storage", storage, "--name", "reference")
        _finished[storage.uri] = outcome(storage, "reference")
    return _finished[storage.uri]


def outcome(storage: Storage, name: str) -> dict[str, Any]:
    run = run_folder(storage, name)
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    facts = json.loads(run.read("_SUCCESS"))
    return {
        "model": run.read("model/model.safetensors"),
        "metrics": tiny.without_times(rows),
        "best": (facts["best_step"], facts["best_validation_loss"], facts["rows_seen"], facts["steps"]),
    }


def run_folder(storage: Storage, name: str) -> Storage:
    return storage / "runs" / "resnet_captioner" / name


@pytest.mark.timeout(1800)
# Three at most, as the fourth crash with one driver ends the run.
@pytest.mark.parametrize("worker_kills", [[4], pytest.param([4, 8, 12], marks=pytest.mark.soak)])
def test_killed_workers_and_a_killed_driver_change_nothing(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    tmp_path: Path,
    worker_kills: list[int],
    shared_ray: dict[str, str],
) -> None:
    """Two workers. One is killed at each of `worker_kills`, then the driver with everything that is left."""
    draw = moments()
    flags = [*FLAGS, "--storage", storage, "--num-workers", NUM_WORKERS]
    if not run_folder(storage, "two").exists("_SUCCESS"):
        call_job(main, *flags, "--name", "two")
    name = f"killed-{len(worker_kills)}"
    run, again, gate = run_folder(storage, name), [*flags, "--name", name], Gate(tmp_path)
    gate.allow(0)
    process = start_job(*JOB, *again, env={**shared_ray, "GATE": str(tmp_path)})
    killed: set[int] = set()
    for step in worker_kills:
        gate.allow(step + AHEAD)
        wait_for_step(run, step, process)
        time.sleep(draw.uniform(0, 0.2))
        group = workers(process)
        assert len(group) == NUM_WORKERS
        worker = draw.choice(group)
        worker.kill()
        killed.add(worker.pid)
        # The next kill hits a worker of the next group.
        wait_until_gone(group)
    assert len(killed) == len(worker_kills)
    second = call_job(main, *again, check=False)
    assert f"the run {run} is being run by process {process.pid} on " in second.stderr
    gate.allow(20 + AHEAD)
    wait_for_starts(gate, 1 + len(worker_kills), process)
    wait_for_step(run, 20, process)
    time.sleep(draw.uniform(0, 0.2))
    kill_with_all_it_started(process)
    stopped = committed_step(run)
    assert 20 <= stopped < NUM_STEPS
    assert not run.exists("_SUCCESS")
    before = rows_until(run, stopped)
    call_job(main, *again)
    assert rows_until(run, stopped)[: len(before)] == before, "steps that were committed were taken again"
    assert outcome(storage, name) == outcome(storage, "two")
    tiny.no_pickles(run)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_killed_stream_goes_on_with_its_epoch_from_the_start(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    """An epoch has five steps. An interrupted epoch is read again, and no step is repeated or left out."""
    run = run_folder(storage, "streamed")
    flags = [*FLAGS, "--stream", "--num-workers", NUM_WORKERS, "--storage", storage, "--name", "streamed"]
    Gate(tmp_path).allow(12 + AHEAD)
    process = start_job(*JOB, *flags, env={**shared_ray, "GATE": str(tmp_path)})
    wait_for_step(run, 12, process)
    kill_with_all_it_started(process)
    stopped = committed_step(run)
    assert 12 <= stopped < NUM_STEPS
    before = rows_until(run, stopped)
    call_job(main, *flags)
    assert rows_until(run, stopped)[: len(before)] == before
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    losses = [row["loss"] for row in rows if "validation_loss" not in row]
    assert [row["step"] for row in rows if "validation_loss" not in row] == list(range(1, NUM_STEPS + 1))
    assert losses[-1] < losses[0]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_worker_that_crashes_again_and_again_ends_the_run(
    start_job: Callable[..., Any],
    storage: Storage,
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    log, gate = tmp_path / "job.log", Gate(tmp_path)
    gate.allow(2 + AHEAD)
    flags = [*FLAGS, "--storage", storage, "--name", "crashes"]
    process = start_job(*JOB, *flags, env={**shared_ray, "GATE": str(tmp_path)}, log=log)
    for crashes in range(4):
        # Only once it trains, as Ray counts earlier deaths differently.
        wait_for_step(run_folder(storage, "crashes"), 2, process)
        wait_for_starts(gate, crashes + 1, process)
        group = wait_for_workers(process, TRAIN_WORKER)
        for worker in group:
            worker.kill()
        wait_until_gone(group)
    assert process.wait(TIMEOUT_S) == 1
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert line.startswith("error: training crashed 4 times, last: a worker was killed; the same command goes on")


# -- storage that fails --------------------------------------------------------------------------------------------


def assert_only_good_checkpoints_load(run: Path) -> tuple[int, int]:
    """Every folder loads completely or is refused in one line, and the one for resume loads.

    Returns (good, refused).
    """
    good = refused = 0
    for folder in run.glob("checkpoint_2*"):
        try:
            tensors, _ = checkpoint.load(folder, str(folder))
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            refused += 1
        else:
            assert tensors.keys() == {"weights", "ema", "optimizer", "best"}
            good += 1
    snapshot = json.loads((run / "checkpoint_manager_snapshot.json").read_bytes())
    checkpoint.load(run / snapshot["latest_checkpoint_result"]["checkpoint_dir_name"], "latest")
    return good, refused


@contextlib.contextmanager
def disk_kept_full(folder: Path, free_bytes: int) -> Iterator[None]:
    """Within the block there is hardly any room on the file system of `folder`."""
    stop, is_full = threading.Event(), threading.Event()

    def fill() -> None:
        number = 0
        while not stop.is_set():
            free = shutil.disk_usage(folder).free - free_bytes
            if free > 0:
                number += 1
                with contextlib.suppress(OSError), (folder / f"filler-{number}").open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, free)
            else:
                is_full.set()
            time.sleep(0.005)

    thread = threading.Thread(target=fill)
    thread.start()
    is_full.wait()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        for filler in folder.glob("filler-*"):
            filler.unlink()


@pytest.fixture
def disk(storage: Storage) -> Iterator[Path]:
    """A file system of 20 MB as the folder of the runs named `disk-full`."""
    folder = Path(run_folder(storage, "disk-full").uri)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with small_disk(folder, megabytes=20) as disk:
        yield disk.path


@pytest.mark.timeout(1800)
def test_a_full_disk_never_leaves_a_checkpoint_that_loads(
    start_job: Callable[..., Any],
    call_job: Callable[..., Any],
    storage: Storage,
    disk: Path,
    tmp_path: Path,
    shared_ray: dict[str, str],
) -> None:
    run = run_folder(storage, "disk-full")
    command = [*FLAGS, "--storage", storage, "--name", "disk-full"]
    log, gate = tmp_path / "job.log", Gate(tmp_path)
    gate.allow(10)
    process = start_job(*JOB, *command, env={**shared_ray, "GATE": str(tmp_path)}, log=log)
    wait_for_step(run, 10, process)
    # Ray removes a third checkpoint after that step. Its room would be enough for a complete one.
    wait_until(lambda: len(list(disk.glob("checkpoint_2*"))) <= 2, process, "removal of a checkpoint")
    # Room for a part of a checkpoint: one file is truncated, others are complete.
    with disk_kept_full(disk, free_bytes=250_000):
        gate.open()
        assert process.wait(TIMEOUT_S) == 1, log.read_text()[-4000:]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert errors[0].startswith(f"error: {disk}/")
    assert "No space left on device; make room there and give the same command again" in errors[0]
    stopped = committed_step(run)
    assert 10 <= stopped < NUM_STEPS
    good, refused = assert_only_good_checkpoints_load(disk)
    assert good >= 1
    assert refused >= 1, "the disk was to fill up in the middle of a checkpoint"
    assert not run.exists("_SUCCESS")
    before = rows_until(run, stopped)
    call_job(main, *command)
    assert rows_until(run, stopped)[: len(before)] == before
    assert outcome(storage, "disk-full")["best"][-1] == NUM_STEPS


class Relay:
    """A TCP relay in front of a server that can be closed, like a network that fails and recovers."""

    def __init__(self, target_port: int) -> None:
        self.port, self.target_port = free_port(), target_port
        self.connections: list[socket.socket] = []
        self.listener: socket.socket | None = None

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        assert self.listener is not None
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self.connections.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.target_port))
                self.connections += [client, server]
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._relay, args=(source, sink), daemon=True).start()

    @staticmethod
    def _relay(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.soak  # five minutes; a full disk also truncates checkpoints
@pytest.mark.timeout(1800)
def test_unreachable_storage_never_leaves_a_checkpoint_that_loads(
    start_job: Callable[..., Any],
    storage: Storage,
    reference: dict[str, Any],
    s3_server: str,
    tmp_path: Path,
) -> None:
    there = Storage(s3_server)
    # Prepared and encoded by the earlier jobs.
    for path in sorted(Path(storage.uri).glob("data/**/*")) + sorted(Path(storage.uri).glob("features/**/*")):
        if path.is_file():
            there.upload(path, str(path.relative_to(storage.uri)))
    relay = Relay(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    relay.open()
    env = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{relay.port}", "GATE": str(tmp_path)}
    run, gate = run_folder(there, "cut-off"), Gate(tmp_path)
    flags = [*FLAGS, "--storage", there, "--name", "cut-off"]
    log, log_again = tmp_path / "job.log", tmp_path / "again.log"
    gate.allow(10 + AHEAD)
    process = start_job(*JOB, *flags, env=env, log=log)
    wait_for_step(run, 10, process)
    time.sleep(moments().uniform(0, 0.2))
    relay.shut()
    gate.open()
    assert process.wait(TIMEOUT_S) == 1, log.read_text()[-4000:]
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    stopped = committed_step(run)
    assert 10 <= stopped < NUM_STEPS
    for name in run.folders():
        if name.startswith("checkpoint_"):
            for file in (run / name).list():
                (run / name).download(file, tmp_path / name / file)
    snapshot = json.loads(run.read("checkpoint_manager_snapshot.json"))
    latest = snapshot["latest_checkpoint_result"]["checkpoint_dir_name"]
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    assert (tmp_path / latest).is_dir()
    assert_only_good_checkpoints_load(tmp_path)
    relay.open()
    before = rows_until(run, stopped)
    process = start_job(*JOB, *flags, env=env, log=log_again)
    assert process.wait(TIMEOUT_S) == 0, log_again.read_text()[-4000:]
    assert rows_until(run, stopped)[: len(before)] == before
    assert outcome(there, "cut-off") == reference
    relay.shut()
