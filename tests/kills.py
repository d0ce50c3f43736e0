"""Processes of a job that are found and killed, and how far its run or its blocks are committed."""

import contextlib
import json
import subprocess
import time

import psutil

from mmcore.storage import Storage

TIMEOUT_S = 400.0
# A start of Ray and the first block of a sweep that takes no time; a training's steps take longer.
BLOCKS_TIMEOUT_S = 120.0
# What Ray calls the processes of its workers.
TRAIN_WORKER, MAP_WORKER = "RayTrainWorker", "MapWorker"


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


def wait_for_blocks(parts: Storage, more: int, process: "subprocess.Popen[bytes]") -> None:
    """Until the job has workers of Ray Data, and `parts` has `more` blocks than when it had them.

    They are counted from there, since a worker of a killed run may commit one after the next run began.
    """
    deadline = time.monotonic() + BLOCKS_TIMEOUT_S
    while not workers(process, MAP_WORKER):
        assert process.poll() is None, "the job ended before it had a worker"
        assert time.monotonic() < deadline, "no worker came up: it hangs"
        time.sleep(0.02)
    wanted = len(parts.list(".parquet")) + more
    while len(parts.list(".parquet")) < wanted:
        assert process.poll() is None, "the job ended before it was killed"
        assert time.monotonic() < deadline, "no block was committed: it hangs"
        time.sleep(0.002)


def workers(process: "subprocess.Popen[bytes]", kind: str = TRAIN_WORKER) -> list[psutil.Process]:
    """The processes in which Ray Train, or Ray Data (`MAP_WORKER`), runs this job's workers."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(kind in word for word in child.cmdline()[:1]):
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
