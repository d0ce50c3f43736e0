"""Find and kill processes of a job, and read how much of its run or blocks is committed."""

import contextlib
import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray
from gate import Gate

from mmcore.storage import Storage

# Only ends a job that hangs. On a busy machine Ray and imports take long to start.
TIMEOUT_S = 400.0
# The names of Ray's worker processes.
TRAIN_WORKER, MAP_WORKER = "RayTrainWorker", "MapWorker"


def moments() -> random.Random:
    """Random moments for the kills of a test. It prints its seed; KILL_SEED repeats it."""
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"the moments of the kills are drawn from KILL_SEED={seed}")
    return random.Random(seed)


def committed_step(run: Storage) -> int:
    """The step of the newest checkpoint in Ray Train's snapshot; 0 without one."""
    try:
        snapshot = json.loads(run.read("checkpoint_manager_snapshot.json"))
    except FileNotFoundError:
        return 0
    return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])


def wait_for_step(run: Storage, step: int, process: "subprocess.Popen[bytes]") -> None:
    wait_until(lambda: committed_step(run) >= step, process, f"step {step}")


def wait_for_starts(gate: Gate, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the workers of a gated training have been started `number` times and train."""
    wait_until(lambda: gate.arrived() >= number, process, f"start {number}")


def rows_until(run: Storage, step: int) -> list[dict[str, Any]]:
    """The written metrics of steps up to `step`, including seconds. A run that began again has other seconds."""
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    return [row for row in rows if row["step"] <= step]


def wait_for_workers(process: "subprocess.Popen[bytes]", kind: str, number: int = 1) -> list[psutil.Process]:
    """Wait for `number` worker processes of the job, and return them."""
    wait_until(lambda: len(workers(process, kind)) >= number, process, f"{number} workers")
    return workers(process, kind)


def wait_for_blocks(parts: Storage, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Wait until `number` blocks are committed."""
    wait_until(lambda: len(parts.list(".parquet")) >= number, process, f"{number} blocks")


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes] | None", what: str) -> None:
    """Wait for an event. Fails if `process` is given and ends first."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process is None or process.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in time: it hangs"
        time.sleep(0.01)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Wait until none of the processes runs any more. They were killed or end by themselves."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := [process for process in processes if _lives(process)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    # A zombie keeps its process id, for ever if its parent was killed too.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def workers(process: "subprocess.Popen[bytes]", kind: str = TRAIN_WORKER) -> list[psutil.Process]:
    """The worker processes of this job in Ray Train, or in Ray Data (`MAP_WORKER`)."""
    found = []
    for each in [*psutil.Process(process.pid).children(recursive=True), *actors(process)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(kind in word for word in each.cmdline()[:1]):
                found.append(each)
    return found


def actors(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The worker processes of a job that joined this test's Ray."""
    if not ray.is_initialized():
        return []
    state: Any = ray._private.state
    own = {job["JobID"] for job in state.jobs() if job["DriverPid"] == process.pid}
    pids = [each["Pid"] for each in state.actors().values() if each["JobID"] in own and each["State"] == "ALIVE"]
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def kill_with_all_it_started(process: "subprocess.Popen[bytes]") -> None:
    """Send SIGKILL to the driver, its workers and its Ray, before the workers can finish the run."""
    family = [*actors(process), *psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=0.2)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    wait_until_gone(alive)
