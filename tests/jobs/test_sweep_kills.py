"""A sweep is exactly once, whatever is killed and when: on a Ray of two CPUs, with real generation calls counted."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny_sweep
from kills import MAP_WORKER, wait_for_blocks, workers

from mmcore.storage import Storage

BATCH = 20
# What a worker has in flight when it dies: the block that is generated and the one before, whose images are written.
REDONE_PER_KILL = 2
# Blocks that a worker commits beside those that a kill waits for: up to one until it comes, and after it the two that
# were seen. It leaves room for the next kills and bounds nothing: with more of them the sweep ends before the last.
PASSED_PER_KILL = 3


def parts(out: Storage) -> dict[str, bytes]:
    manifest = out / "manifest"
    return {name: manifest.read(name) for name in manifest.list(".parquet")}


def kill_and_count(
    tmp_path, start_job, run_job, out: str, *, count: int, driver_kills: int, actor_kills: int, num_workers: int = 1
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"the moments of the kills are drawn from {seed}")
    moments = random.Random(seed)
    num_blocks = count // BATCH
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a", seconds=0.25)
    prompts = tiny_sweep.write_prompts(tmp_path / "prompts.txt", count)
    command = ["tests/tiny_sweep.py", "--run", run_folder, "--prompts", prompts, "--out", out]
    command += ["--count", str(count), "--batch-size", str(BATCH), "--num-workers", str(num_workers)]
    out = Storage(str(out))
    committed: dict[str, bytes] = {}
    kills = 0
    blocks_a_kill = num_blocks // (driver_kills + actor_kills + 1) - PASSED_PER_KILL * num_workers
    assert blocks_a_kill > 1, "too few blocks: all kills would come after the first"

    for kill in range(driver_kills):
        generated_before = len(tiny_sweep.calls(run_folder))
        job = start_job(*command)
        wait_for_blocks(out / "manifest", moments.randint(1, blocks_a_kill), job)
        time.sleep(moments.random() * 0.2)
        # Either way its workers, each in a process group of its own, live on for a moment (2 s were seen), and
        # may commit another block or two beside the next run.
        if kill % 2:
            os.kill(job.pid, signal.SIGKILL)
        else:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        kills += 1
        now = parts(out)
        assert {name: now[name] for name in committed} == committed, "a committed block was written again"
        assert not out.exists("summary.json")
        again = {f"{int(name[5:11]) * BATCH:06d}" for name in committed}
        assert not again & set(tiny_sweep.calls(run_folder)[generated_before:]), "committed work was done again"
        committed = now

    job = start_job(*command)
    for _ in range(actor_kills):
        wait_for_blocks(out / "manifest", moments.randint(1, blocks_a_kill), job)
        killed = workers(job, MAP_WORKER)
        assert killed, "no worker was found"
        for actor in killed:
            actor.kill()
        kills += 1
    assert job.wait(timeout=240) == 0, (tmp_path / f"job-{driver_kills}.log").read_text()[-4000:]

    tiny_sweep.check_complete(out, count)
    assert {name: parts(out)[name] for name in committed} == committed, "a committed block was written again"
    calls = tiny_sweep.calls(run_folder)
    assert len(set(calls)) == num_blocks
    redone, most = len(calls) - num_blocks, REDONE_PER_KILL * num_workers * kills
    assert redone <= most, f"{redone} redone after {kills} kills"
    if not out.is_s3:
        tiny_sweep.check_tidy(Path(out.uri))

    before = parts(out)
    again = run_job(*command)
    assert f"all {count} images are done already" in again.stdout
    assert "Ray: started" not in again.stderr
    assert tiny_sweep.calls(run_folder) == calls
    assert parts(out) == before


def test_killed_again_and_again_each_image_is_made_once(tmp_path, start_job, run_job):
    kill_and_count(tmp_path, start_job, run_job, tmp_path / "out", count=1000, driver_kills=5, actor_kills=2)


@pytest.mark.soak
def test_killed_very_often_each_image_is_made_once(tmp_path, start_job, run_job):
    kill_and_count(tmp_path, start_job, run_job, tmp_path / "out", count=4000, driver_kills=15, actor_kills=10)


@pytest.mark.soak
def test_two_workers_that_write_to_s3_are_killed(tmp_path, start_job, run_job, s3_server):
    out, kills = f"{s3_server}/out", {"driver_kills": 4, "actor_kills": 2}
    kill_and_count(tmp_path, start_job, run_job, out, count=2000, num_workers=2, **kills)
