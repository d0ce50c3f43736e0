"""jobs/bench/sweep_overhead.py and batch_sizes.py with tiny sizes: they run and print their figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.bench import batch_sizes
from jobs.bench import sweep_overhead as sweep
from mmcore.generators.diffusion_options import DiffusionOptions
from mmcore.trained.generator import open_generator

ROOT = Path(__file__).parents[2]
BENCH = sweep.SweepBench(smoke=True, pairs=1, count=6, batch_size=4, item_seconds=0.001, num_threads=1)


def test_the_loop_makes_every_image(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = open_generator(sweep.write_random_run(tmp_path / "run", BENCH).uri).load()
    assert sweep.steps_that_take(generator, BENCH) >= 1
    assert sweep.loop(generator, BENCH, 2, tmp_path / "loop") > 0
    torch.set_num_threads(threads)
    assert len(list((tmp_path / "loop").glob("*.png"))) == 6


@pytest.mark.soak
@pytest.mark.parametrize("part", ["loop", "workers"])
def test_figures(part, job_environment):
    settings = {"part": part, "pairs": 1, "count": 6, "batch-size": 4, "item-seconds": 0.001}
    command = [sys.executable, "jobs/bench/sweep_overhead.py", "--smoke"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"ratio", "steps", "threads_per_worker", "commit"} <= result.keys()
    assert result.get("target_met") is None


def test_images_of_two_batch_sizes_are_compared(tmp_path):
    run = sweep.write_random_run(tmp_path / "run", BENCH).uri
    bench = batch_sizes.BatchSizes(run=run, count=3, batch_sizes=(1, 2))
    figures = batch_sizes.measure(bench, DiffusionOptions(steps=2))["against batches of 1"]["batches of 2"]
    assert figures["images_within_1"] == 1


def test_differences_are_counted():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    others = images.copy()
    others[1, 0, 0, 0], others[2, 0, 0] = 1, 200
    assert batch_sizes.differences(images, others) == {
        "images_equal": 0.5,
        "images_within_1": 0.75,
        "values_differing": 4 / 48,
        "values_differing_by_more_than_1": 3 / 48,
        "largest_difference": 200,
    }


@pytest.mark.process
def test_one_batch_size_is_refused(tmp_path):
    run = sweep.write_random_run(tmp_path / "run", BENCH).uri
    command = [sys.executable, "jobs/bench/batch_sizes.py", "--run", run, "--batch-sizes", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: --batch-sizes 4: give two or more, each at least 1"
