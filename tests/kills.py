"""Processes of a job that are found and killed, and how far its run or its blocks are committed."""

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

# No more than a guard against a job that hangs: a busy machine takes long to start Ray, and its workers to import.
TIMEOUT_S = 400.0
# What Ray calls the processes of its workers.
TRAIN_WORKER, MAP_WORKER = "RayTrainWorker", "MapWorker"


def moments() -> random.Random:
    """What the moments of a test's kills are drawn from; KILL_SEED repeats those that a failed test has printed."""
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(10**6))
    print(f"the moments of the kills are drawn from KILL_SEED={seed}")
    return random.Random(seed)


def committed_step(run: Storage) -> int:
    """The step of the newest checkpoint that Ray Train's snapshot names; 0 where there is none."""
    try:
        snapshot = json.loads(run.read("checkpoint_manager_snapshot.json"))
    except FileNotFoundError:
        return 0
    return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])


def wait_for_step(run: Storage, step: int, process: "subprocess.Popen[bytes]") -> None:
    wait_until(lambda: committed_step(run) >= step, process, f"step {step}")


def wait_for_starts(gate: Gate, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the workers of a gated training have been started so often, and train."""
    wait_until(lambda: gate.arrived() >= number, process, f"start {number}")


def rows_until(run: Storage, step: int) -> list[dict[str, Any]]:
    """What a run has written of its steps up to `step`, their seconds too: a run that began anew has others."""
    rows = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    return [row for row in rows if row["step"] <= step]


def wait_for_workers(process: "subprocess.Popen[bytes]", kind: str, number: int = 1) -> list[psutil.Process]:
    """The processes of the job's workers, once it has so many."""
    wait_until(lambda: len(workers(process, kind)) >= number, process, f"{number} workers")
    return workers(process, kind)


def wait_for_blocks(parts: Storage, number: int, process: "subprocess.Popen[bytes]") -> None:
    """Until as many are committed."""
    wait_until(lambda: len(parts.list(".parquet")) >= number, process, f"{number} blocks")


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes] | None", what: str) -> None:
    """Fails where `process`, if it is one's job to bring it about, ends before."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process is None or process.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < deadline, f"no {what} in time: it hangs"
        time.sleep(0.01)


def wait_until_gone(processes: list[psutil.Process]) -> None:
    """Until none of them, which were killed or will end by themselves, does anything any more."""
    deadline = time.monotonic() + TIMEOUT_S
    while left := [process for process in processes if _lives(process)]:
        assert time.monotonic() < deadline, f"{left} are left"
        time.sleep(0.02)


def _lives(process: psutil.Process) -> bool:
    # A dead one for which nobody has waited still has its number: perhaps for ever, where its parent was killed too.
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def workers(process: "subprocess.Popen[bytes]", kind: str = TRAIN_WORKER) -> list[psutil.Process]:
    """The processes in which Ray Train, or Ray Data (`MAP_WORKER`), runs this job's workers."""
    found = []
    for each in [*psutil.Process(process.pid).children(recursive=True), *actors(process)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(kind in word for word in each.cmdline()[:1]):
                found.append(each)
    return found


def actors(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """Of a job that joined the Ray of this test process: all that live and work for it."""
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
    """SIGKILL to the driver and, before its workers end the run without it, to them and to all of its own Ray."""
    family = [*actors(process), *psutil.Process(process.pid).children(recursive=True)]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=0.2)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    wait_until_gone(alive)
