"""jobs/bench/sweep.py at a tiny size: that it runs and gives its figures. No time is checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.bench import sweep
from mmcore.generators.trained import TrainedGenerator

ROOT = Path(__file__).parents[2]
BENCH = sweep.SweepBench(smoke=True, pairs=1, count=6, batch_size=4, item_seconds=0.001, num_threads=1)


def test_the_loop_makes_every_image(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = TrainedGenerator(sweep.write_random_run(tmp_path / "run", BENCH))
    assert sweep.steps_that_take(generator, BENCH) >= 1
    assert sweep.loop(generator, BENCH, 2, tmp_path / "loop") > 0
    torch.set_num_threads(threads)
    assert len(list((tmp_path / "loop").glob("*.png"))) == 6


@pytest.mark.soak
@pytest.mark.parametrize("part", ["loop", "workers"])
def test_figures(part, job_environment):
    settings = {"part": part, "pairs": 1, "count": 6, "batch-size": 4, "item-seconds": 0.001}
    command = [sys.executable, "jobs/bench/sweep.py", "--smoke"]
    command += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {"ratio", "steps", "threads_per_worker", "commit"} <= result.keys()
    assert result.get("target_met") is None
