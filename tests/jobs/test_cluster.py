"""Joining a cluster, and naming the resources that a stalled job waits for, on real local Rays."""

import ast
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from conftest import HANG_S
from job_output import PATIENT_WATCHDOG
from ray._private import ray_logging
from ray.core.generated.autoscaler_pb2 import NodeStatus
from ray.train.v2._internal import constants

from jobs import train_resnet_captioner
from jobs.runtime import cluster, ray_private, trainer, watchdog
from jobs.runtime.job import parse_job
from mmcore.captioners.facts import CaptionerFacts
from mmcore.errors import InputError
from mmcore.text import TokenIds

# Unlike that of the tests with `watched`.
DESCRIBE_WAITING = watchdog.describe_waiting
STATUS_JOB = """
import os, sys
from pathlib import Path
from jobs.runtime import cluster
from jobs.runtime.cluster import connect
cluster.REMOVE_TIMEOUT_S = 300.0  # however long Ray's processes take to end
if "--default-interval" in sys.argv:
    del os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]
connect(); connect()
cluster.show_dashboard(); cluster.show_dashboard()
import ray
token_file = os.environ.get("RAY_AUTH_TOKEN_PATH")
mode = oct(os.stat(token_file).st_mode & 0o777) if token_file else None
answer = ray.get(ray.remote(lambda: 41 + 1).remote())
print({"cpus": ray.cluster_resources()["CPU"], "answer": answer, "auth": os.environ.get("RAY_AUTH_MODE"),
       "token_file": token_file, "token_file_mode": mode,
       "interval": os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"]})
"""


@pytest.mark.parametrize(
    "history",
    ["none", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("token from earlier", "mode disabled"))],
)
def test_a_local_ray_starts_whatever_ray_left_behind(history, run_job, tmp_path, short_tmp):
    killed = short_tmp / "mmcore-ray-of-a-killed-job"
    killed.mkdir(exist_ok=True)
    (killed / "lock").touch()
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    env, flags = {"HOME": str(home), "TMPDIR": str(temporary)}, ["--default-interval"]
    if history == "token from earlier":
        (home / ".ray" / "auth_token").write_text("a" * 64)
    elif history.startswith("mode"):
        env["RAY_AUTH_MODE"] = history.removeprefix("mode ")
        env["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"], flags = "0.25", []
    script = tmp_path / "status.py"
    script.write_text(STATUS_JOB)

    done = run_job(script, *flags, env=env)

    result = ast.literal_eval(done.stdout.strip())
    assert not killed.exists()
    assert not list(temporary.iterdir()), "Ray's processes leave nothing there"
    assert result["answer"] == 42
    assert result["cpus"] >= cluster.MIN_LOCAL_CPUS
    assert result["auth"] == ("disabled" if history == "mode disabled" else "token")
    assert result["interval"] == ("0.25" if history.startswith("mode") else str(cluster.HEALTH_CHECK_INTERVAL_S))
    lines = [line for line in done.stderr.splitlines() if line.startswith("Ray:")]
    starting, started, dashboard = lines
    assert starting == "Ray: starting on this machine"
    assert re.match(r"Ray: started, \d+ CPU cores?", started)
    assert dashboard.startswith("Ray: dashboard http://127.0.0.1:")
    if history == "none":
        # A token file left in the home folder would block the next `ray job submit`.
        assert not (home / ".ray" / "auth_token").exists()
        assert result["token_file_mode"] == "0o600"
        assert not Path(result["token_file"]).parent.exists(), "the folder of this Ray is removed at exit"
    else:
        assert result["token_file"] is None


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers there"),
        ("http://127.0.0.1:8265", "use `ray job submit`"),
        ("ray://127.0.0.1:10001", "HOST:PORT"),
        ("nonsense", "Invalid address format"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address, message, monkeypatch):
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    # Without this it would retry for minutes.
    monkeypatch.setattr(cluster.ray, "init", lambda **settings: pytest.fail("Ray is asked to join"))
    with pytest.raises(InputError, match=message) as refused:
        cluster.connect()
    assert address in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    def too_slow(**settings):
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", too_slow)
    monkeypatch.setattr(cluster.ray_private, "reload_auth_mode", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE", "disabled"))
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    busy = "the machine is too busy, or short of memory: give the same command again"
    began = rf"^Ray does not start on this machine; {busy}; .*\(RAY_TMPDIR\)"
    with pytest.raises(InputError, match=f"{began}: The current node timed out during s"):
        cluster.connect()


@pytest.fixture
def printed(monkeypatch) -> Callable[..., list[str]]:
    """Which of the lines of one process Ray prints."""
    for name in ("stdout_deduplicator", "stderr_deduplicator"):
        monkeypatch.setattr(ray_logging, name, ray_logging.LogDeduplicator(5, None, "left out (by|for) the user"))

    def of(lines: list[str], pid: object = 7) -> list[str]:
        (batch,) = ray_logging.stderr_deduplicator.deduplicate({"pid": pid, "lines": lines})
        assert ray_logging.stdout_deduplicator.deduplicate({"pid": pid, "lines": lines}) == [batch]
        return batch["lines"]

    return of


@pytest.mark.parametrize("ended_by", [SystemExit, KeyboardInterrupt])
def test_a_dead_controller_is_told_of_unless_ctrl_c_ended_it(ended_by, printed):
    """Ray Train's own handler of Ctrl-C ends the process; before it is in place, the job's handler interrupts."""
    lines = ["an error", f"{trainer._CONTROLLER_IS_DEAD} (01) is dead. Cleaning up"]
    before = signal.getsignal(signal.SIGINT)
    try:
        with trainer._ctrl_c_interrupts():
            assert printed(lines) == lines
        with pytest.raises(KeyboardInterrupt), trainer._ctrl_c_interrupts():
            raise ended_by
    finally:
        signal.signal(signal.SIGINT, before)
    assert printed(lines) == ["an error"]


def test_of_a_good_job_ray_prints_no_warnings(printed, monkeypatch):
    lost = " has constructor arguments in the object store and max_restarts > 0. If the arguments go out of scope"
    ours = f"core_worker.cc:2465: Actor with class name: 'RunMonitor' and ID: '01'{lost}"
    watcher, by_user = ours.replace("RunMonitor", "PreemptionWatcher"), "left out for the user"
    machine = "WARNING: 8 PYTHON worker processes have been started on node: 01 with address: 127.0.0.1, which is 2x"
    monkeypatch.setattr(cluster, "_start_local", lambda: None)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    for name, value in (("RAY_ADDRESS", ""), ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1"), ("RAY_COLOR_PREFIX", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    monkeypatch.setattr(ray_logging, "_color", ray_logging._color)
    cluster.connect()
    cluster.connect()
    assert printed([ours, watcher, by_user]) == [ours]
    assert printed([machine, "another"], pid="raylet") == ["another"]
    assert ray_logging.stdout_deduplicator.skip_re.pattern.count("PreemptionWatcher") == 1


def test_a_job_keeps_its_handler_of_sigterm_when_ray_starts():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with cluster._sigterm_kept():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray sets its own
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_lines_of_workers_are_plain(monkeypatch):
    monkeypatch.setattr(ray_logging, "_color", ray_logging._color)
    monkeypatch.setenv("RAY_COLOR_PREFIX", "1")
    ray_private.print_without_colours()
    repeated = ray_logging.DedupState(0, 3, "an error", {"ip": "1", "pid": 7}, {})
    assert "\x1b" not in repeated.formatted()
    assert os.environ["RAY_COLOR_PREFIX"] == "0"


def wait_until_named(text: str) -> str:
    """Poll `describe_waiting()` until it contains `text`, as the head learns of demands by heartbeats."""
    deadline = time.monotonic() + HANG_S
    while text not in (described := watchdog.describe_waiting()):
        assert time.monotonic() < deadline, described
        time.sleep(0.2)
    return described


@contextlib.contextmanager
def two_tasks(folder: Path, **options: Any) -> Iterator[None]:
    """Two tasks that end with the block."""
    import ray

    release = folder / "release"

    def busy() -> None:
        while not release.exists():
            time.sleep(0.05)

    tasks = [ray.remote(**options)(busy).remote() for _ in range(2)]
    try:
        yield
    finally:
        release.touch()
        ray.get(tasks)


def test_what_waits_is_named_with_what_is_missing(ray_local, tmp_path):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    wait_until_named(watchdog.ALL_PLACED)
    has_cpus = int(ray.cluster_resources()["CPU"])

    group = placement_group([{"CPU": 1, "GPU": 1}] * 2, name="workers")
    described = wait_until_named("placement group")
    assert "waiting for a placement group 'workers' of {CPU: 1, GPU: 1} x 2" in described
    assert f"the cluster has CPU {has_cpus} (" in described
    assert "GPU 0 (0 free); missing: GPU" in described
    remove_placement_group(group)

    @ray.remote(num_cpus=0, num_gpus=1)
    class NeedsGpu:
        pass

    actor = NeedsGpu.remote()
    described = wait_until_named("{GPU: 1}")
    assert "pending actors: NeedsGpu" in described
    assert "missing: GPU" in described
    ray.kill(actor)
    wait_until_named(watchdog.ALL_PLACED)

    with two_tasks(tmp_path, num_cpus=has_cpus):
        # Enough in total, but nothing free: an autoscaler or waiting helps.
        described = wait_until_named("all in use: CPU")
    assert f"waiting for {{CPU: {has_cpus}}}" in described
    assert "missing" not in described

    # Enough in total, but not on a single node.
    assert watchdog._lacking([watchdog.Counter(CPU=6)], [watchdog.Counter(CPU=4)] * 2) == {"CPU"}
    assert watchdog._lacking([watchdog.Counter(CPU=4)] * 2, [watchdog.Counter(CPU=4)] * 2) == set()


def test_demands_inside_a_placement_group_are_told_apart(ray_local, tmp_path):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = placement_group([{"CPU": 1}])
    ray.get(group.ready())
    with two_tasks(tmp_path, num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group)):
        described = wait_until_named("inside a full placement group")
    assert "{CPU: 1}" in described
    # The CPU of the placement group is not counted twice.
    assert f"the cluster has CPU {ray.cluster_resources()['CPU']:g} (" in described
    remove_placement_group(group)


class FakeTime(threading.Event):
    """The clock of a watchdog and the event that it waits for. Time passes only in its waits."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.moments = {}
        """Events during the waits of the watchdog, by second."""

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        """Of the thread that asks the head."""

    def wait(self, timeout):
        until = self.now + timeout
        for moment in sorted(moment for moment in self.moments if moment <= until):
            self.now = moment
            self.moments.pop(moment)()
        self.now = until
        return self.is_set()


@pytest.fixture
def watched(monkeypatch):
    """`watched(watchdog settings, usual_s=..., beats=..., until=...)`: the lines of the watchdog, by second."""
    monkeypatch.setattr(watchdog, "QUERY_TIMEOUT_S", HANG_S)
    monkeypatch.setattr(watchdog, "describe_waiting", lambda: "waiting for Godot")

    def watched(what, *, beats=(), until, usual_s=0.0, **settings):
        fake, said = FakeTime(), []

        def end(line):
            said.append((fake.now, line))
            raise SystemExit

        monkeypatch.setattr(watchdog, "time", fake)
        monkeypatch.setattr(watchdog, "say", lambda line: said.append((fake.now, line)))
        monkeypatch.setattr(watchdog, "end_process", end)
        dog = watchdog.Watchdog(what, **settings)
        dog._stop, dog.usual_s = fake, usual_s
        fake.moments = dict.fromkeys(beats, dog.beat) | {until: fake.set}
        with contextlib.suppress(SystemExit):
            dog._watch()
        return said

    return watched


def test_watchdog_is_silent_while_there_is_progress(watched):
    """A beat restarts the time. After the first line, further lines come every minute."""
    line = "stalled: training: no progress for {} s: waiting for Godot"
    said = watched("training", report_after_s=15, beats=[*range(1, 21), 45], until=199)
    assert said == [(35, line.format(15)), (60, line.format(15)), (120, line.format(75)), (180, line.format(135))]


def test_watchdog_ends_what_stalls_for_too_long(watched):
    line = "training: no progress for {} s: waiting for Godot"
    said = watched("training", report_after_s=15, stall_timeout_s=40, beats=[10, 30], until=199)
    assert said == [(25, f"stalled: {line.format(15)}"), (45, f"stalled: {line.format(15)}"),
                    (70, f"error: {line.format(40)} (--stall-timeout 40)")]  # fmt: skip


def test_watchdog_ends_with_its_block():
    with watchdog.Watchdog("training") as dog:
        assert dog._thread.is_alive()
    dog._thread.join(HANG_S)
    assert not dog._thread.is_alive()


def test_a_long_wait_that_is_usual_is_reported_calmly(watched):
    """Until it takes three times as long."""
    said = watched("sweep", report_after_s=15, usual_s=100.0, until=349)
    usual = "waiting: sweep: no progress for {} s (earlier waits took up to 100 s): waiting for Godot"
    assert said == [(idle_s, usual.format(idle_s)) for idle_s in range(15, 300, 60)] + [
        (315, "stalled: sweep: no progress for 315 s: waiting for Godot")
    ]


def test_what_has_all_that_it_asked_for_is_slow_and_no_stall(watched, monkeypatch):
    node = SimpleNamespace(total_resources={"CPU": 4.0}, available_resources={"CPU": 1.0}, status=NodeStatus.RUNNING)
    state = SimpleNamespace(node_states=[node], pending_gang_resource_requests=[], pending_resource_requests=[])
    monkeypatch.setattr(watchdog, "describe_waiting", DESCRIBE_WAITING)
    monkeypatch.setattr(watchdog.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(watchdog, "placement_group_table", dict)
    monkeypatch.setattr(watchdog.ray_private, "scheduling_state", lambda: state)
    monkeypatch.setattr(watchdog.ray_private, "actor_states", list)
    ((_, line),) = watched("sweep", report_after_s=15, until=20)
    assert line == (
        "slow: sweep: no progress for 15 s: the workers have what they asked for, so the work takes long or the "
        "machine is busy; nothing needs to be done"
    )


def test_watchdog_reports_a_head_that_does_not_answer(watched, monkeypatch):
    def gone():
        raise ConnectionError("the head\nis gone")

    monkeypatch.setattr(watchdog, "describe_waiting", gone)
    ((_, line),) = watched("sweep", report_after_s=15, until=20)
    assert line.endswith("no progress for 15 s: the cluster's state cannot be read (ConnectionError: the head is gone)")

    answer = threading.Event()
    monkeypatch.setattr(watchdog, "describe_waiting", answer.wait)
    monkeypatch.setattr(watchdog, "QUERY_TIMEOUT_S", 0.1)
    ((_, line),) = watched("sweep", report_after_s=15, until=20)
    answer.set()
    assert line == "stalled: sweep: no progress for 15 s: the cluster's head does not answer"


def test_a_stall_is_named_within_a_minute_by_default():
    assert watchdog.Watchdog("training").report_after_s + watchdog.QUERY_TIMEOUT_S < 60
    with pytest.raises(InputError, match="--stall-timeout -1"):
        watchdog.Watchdog("training", stall_timeout_s=-1)


def command_lines() -> list[str]:
    return [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]


STALLED_JOB = """
import ray
from jobs.runtime.cluster import connect, show_dashboard
from jobs.runtime.watchdog import Watchdog
connect()
show_dashboard()

@ray.remote(num_gpus=1)
def never():
    pass

print("waits", flush=True)
with Watchdog("training", stall_timeout_s=4, report_after_s=2):
    ray.get(never.remote())
"""


def test_stall_timeout_ends_a_job_that_is_blocked_in_ray(run_job, tmp_path):
    script = tmp_path / "stalled.py"
    script.write_text(PATIENT_WATCHDOG + STALLED_JOB)
    done = run_job(script, check=False, env={"CUDA_VISIBLE_DEVICES": "", "HOME": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("waits\n")
    lines = done.stderr.splitlines()
    # The head must answer in time for a report before the last one.
    *reports, last = [line for line in lines if re.match(r"(stalled|error): training: no progress for \d+ s: ", line)]
    assert all(report.startswith("stalled: ") for report in reports)
    assert last.startswith("error: ")
    assert last.endswith("(--stall-timeout 4)")
    for line in (*reports, last):
        assert "waiting for {CPU: 1, GPU: 1}" in line
        assert "missing: GPU" in line
    # The reaper of that Ray ends its processes. They are recognised by the folder in their command lines.
    (dashboard,) = [line for line in lines if line.startswith("Ray: dashboard ")]
    folder = dashboard.partition("token in ")[2].rpartition("/")[0]
    assert "mmcore-ray-" in folder
    deadline = time.monotonic() + HANG_S
    while left := [name for name in command_lines() if folder in name]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


class Reached(Exception):
    """Wait until the value has reached Ray Train."""


def test_training_hands_on_which_ray_its_actors_ask(ray_local, tmp_path, monkeypatch):
    variable, handed_on = "RAY_API_SERVER_ADDRESS", {}
    # An earlier training in this process may have added it.
    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", constants.ENV_VARS_TO_PROPAGATE - {variable})

    def trainer_made(*args, **kwargs):
        handed_on.update(constants.get_env_vars_to_propagate())
        raise Reached

    monkeypatch.setattr(trainer, "TorchTrainer", trainer_made)
    flags = ["--variant", "smoke", "--storage", str(tmp_path)]
    job = parse_job(train_resnet_captioner.__file__, train_resnet_captioner.VARIANTS, "", flags)
    facts = CaptionerFacts(TokenIds(size=8, bos_id=1, eos_id=2, silent_ids=(0, 1, 3)), image_tokens=4, encoder_width=8)
    with pytest.raises(Reached):
        trainer.run_training(job, lambda *_: pytest.fail("no worker is started"), facts)
    assert handed_on[variable] == os.environ[variable]


@pytest.mark.nightly  # the test above checks what is passed on, this one that Ray Train's own actors use it
def test_of_two_rays_the_actors_of_training_ask_their_own(ray_local, run_job, tmp_path):
    """Even if the user's shell names the other cluster for `ray job submit`.

    By default Ray joins any cluster that it finds.
    """
    env = {"RAY_API_SERVER_ADDRESS": os.environ["RAY_API_SERVER_ADDRESS"]}
    done = run_job("jobs/train_resnet_captioner.py", "--variant", "smoke", "--storage", tmp_path, env=env)
    assert "finished: " in done.stdout
    for words in ("PlacementGroupCleaner", "multiple active Ray", "Traceback"):
        assert words not in done.stdout + done.stderr
