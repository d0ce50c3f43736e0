"""A sweep is exactly once for any kill at any time. The tests count real generation calls.

The soak tests start a Ray of two CPUs for each run.
"""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import tiny_sweep
from gate import Gate
from kills import MAP_WORKER, TIMEOUT_S, moments, wait_for_workers, wait_until, wait_until_gone

from mmcore.storage import Storage

BATCH = 20
# Work in flight of a killed worker: the block being generated, and the previous block, whose images are being written.
REDONE_PER_KILL = 2


def parts(out: Storage) -> dict[str, bytes]:
    manifest = out / "manifest"
    return {name: manifest.read(name) for name in manifest.list(".parquet")}


def kill_and_count(
    tmp_path,
    start_job,
    run_job,
    place,
    *,
    count: int,
    driver_kills: int,
    actor_kills: int,
    num_workers: int = 1,
    env: Mapping[str, str] | None = None,
) -> None:
    draw = moments()
    num_blocks = count // BATCH
    # The number of blocks that may start before a kill, so that some are left for the next run even if the kill is
    # late.
    blocks_a_kill = num_blocks // (driver_kills + actor_kills + 1)
    in_flight = REDONE_PER_KILL * num_workers
    assert blocks_a_kill > in_flight + 1, "too few blocks: no kill would come amid work"
    run_folder = tiny_sweep.write_run(tmp_path / "runs" / "tiny" / "a")
    prompts = tiny_sweep.write_prompts(tmp_path / "prompts.txt", count)
    command = ["tests/tiny_sweep.py", "--run", run_folder, "--prompts", prompts, "--out", place]
    command += ["--count", str(count), "--batch-size", str(BATCH), "--num-workers", str(num_workers)]
    out, gate = Storage(str(place)), Gate(run_folder)
    committed: dict[str, bytes] = {}
    killed: list[psutil.Process] = []

    def work_for_a_moment() -> list[psutil.Process]:
        """Wait for workers of `job` that started blocks after the last kill's workers were gone."""
        actors = wait_for_workers(job, MAP_WORKER, num_workers)
        wait_until_gone(killed)
        wanted = len(gate.begun()) + draw.randint(in_flight + 1, blocks_a_kill - 1)
        gate.allow_more(blocks_a_kill)
        wait_until(lambda: len(gate.begun()) >= wanted, job, f"block {wanted}")
        time.sleep(draw.random() * 0.05)
        return actors

    for kill in range(driver_kills):
        generated_before = len(gate.begun())
        gate.allow(generated_before)
        job = start_job(*command, env=env)
        killed = work_for_a_moment()
        # Its workers, each in its own process group, live on for a moment (2 s were seen). They may commit one or two
        # more blocks next to the next run.
        if kill % 2:
            os.kill(job.pid, signal.SIGKILL)
        else:
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        now = parts(out)
        assert {name: now[name] for name in committed} == committed, "a committed block was written again"
        assert not out.exists("summary.json")
        again = {f"{int(name[5:11]) * BATCH:06d}" for name in committed}
        assert not again & set(tiny_sweep.calls(run_folder)[generated_before:]), "committed work was done again"
        committed = now

    gate.allow_more(0)
    job = start_job(*command, env=env)
    for _ in range(actor_kills):
        killed = work_for_a_moment()
        for actor in killed:
            actor.kill()
        wait_until_gone(killed)
    gate.open()
    assert job.wait(TIMEOUT_S) == 0, (tmp_path / f"job-{driver_kills}.log").read_text()[-4000:]

    tiny_sweep.check_complete(out, count)
    assert {name: parts(out)[name] for name in committed} == committed, "a committed block was written again"
    calls = tiny_sweep.calls(run_folder)
    assert len(set(calls)) == num_blocks
    kills = driver_kills + actor_kills
    redone, most = len(calls) - num_blocks, in_flight * kills
    assert redone <= most, f"{redone} redone after {kills} kills"
    if not out.is_s3:
        tiny_sweep.check_tidy(Path(out.uri))

    before = parts(out)
    again = run_job(*command, env=env)
    assert f"all done already: {count} images" in again.stdout
    assert "Ray: " not in again.stderr
    assert tiny_sweep.calls(run_folder) == calls
    assert parts(out) == before


@pytest.mark.timeout(1800)
def test_killed_again_and_again_each_image_is_made_once(tmp_path, start_job, run_job, shared_ray):
    kills = {"driver_kills": 2, "actor_kills": 1, "env": shared_ray}
    kill_and_count(tmp_path, start_job, run_job, tmp_path / "out", count=400, **kills)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_very_often_each_image_is_made_once(tmp_path, start_job, run_job):
    kill_and_count(tmp_path, start_job, run_job, tmp_path / "out", count=4000, driver_kills=15, actor_kills=10)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_workers_that_write_to_s3_are_killed(tmp_path, start_job, run_job, s3_server):
    out, kills = f"{s3_server}/out", {"driver_kills": 4, "actor_kills": 2}
    kill_and_count(tmp_path, start_job, run_job, out, count=2000, num_workers=2, **kills)
