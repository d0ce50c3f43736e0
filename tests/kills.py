"""Processes of a job that are found and killed, and how far its run is committed."""

import contextlib
import json
import subprocess
import time

import psutil

from mmcore.storage import Storage

TIMEOUT_S = 400.0


def committed_step(run: Storage) -> int:
    """The step of the newest checkpoint that Ray Train's snapshot names; 0 where there is none."""
    try:
        snapshot = json.loads(run.read("checkpoint_manager_snapshot.json"))
    except FileNotFoundError:
        return 0
    return int(snapshot["latest_checkpoint_result"]["metrics"]["step"])


def wait_for_step(run: Storage, step: int, process: "subprocess.Popen[bytes]") -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while (now := committed_step(run)) < step:
        assert process.poll() is None, f"the job ended at step {now}, before it could be disturbed"
        assert time.monotonic() < deadline, f"no step {step} in time; at {now}"
        time.sleep(0.02)
    return now


def workers(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes in which Ray Train runs this job's workers."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("RayTrainWorker" in word for word in child.cmdline()[:1]):
                found.append(child)
    return found


def kill_with_all_it_started(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to the driver and, before its workers end the run without it, to all of its Ray."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=0.2)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=10)
