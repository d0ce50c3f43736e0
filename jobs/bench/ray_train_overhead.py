#!/usr/bin/env python
"""Measures the overhead of Ray Train per training step: the same loop under Ray Train and under plain torchrun.

Command: python jobs/bench/ray_train_overhead.py           (idle machine; 2 CPU cores: about 4 minutes)
         python jobs/bench/ray_train_overhead.py --num-workers 2
Target: a ratio of step times of at most 1.025. At most 1.05 is required.

Both run `mmcore.training.Training` on one model with the same data in memory, workers and threads. Under Ray it is a
whole job: `run_training` with progress messages, their polling, and Ray's health checks. Under torchrun no hook is set.
The timed steps contain no checkpoint and no validation. The time is taken from the end of the warm-up to the last step,
so start and end are not counted. The ratio uses the mean over the steps, which includes occasional work of Ray. The
median, which does not, is printed too. Each run has its own process group. Ray is shut down while torchrun runs, as its
daemons would slow it.

By default one core is left for Ray's own processes, which use about a tenth of a core. With a thread on every core,
each of their wake-ups stops all threads of a step. docs/results.md has both figures.

The model is the decoder of `best` with one caption per image. Its steps are several times shorter than in a real run,
so a fixed overhead has a larger share.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from jobs.bench.inputs import synthetic_training, tiny
from jobs.bench.timing import interleaved, publish, say, verdict
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, RunOptions
from jobs.runtime.ray_private import cpus
from jobs.runtime.source import ROOT
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import run_training
from mmcore.captioners.cross_attention import VARIANTS, CrossAttentionCaptionerRecipe
from mmcore.errors import InputError
from mmcore.flags import read_settings
from mmcore.recipe import recipe_to_json
from mmcore.storage import Storage
from mmcore.training_plan import check_batch

AIMED, REQUIRED = 1.025, 1.05
MIN_STEPS = 100
_TORCHRUN_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class OverheadBench:
    """Settings of the benchmark."""

    num_workers: int = 1
    """Training workers, under Ray and under torchrun."""
    num_threads: int | None = None
    """CPU threads per worker. By default all cores but one are divided among the workers."""
    pairs: int = 5
    """Number of pairs: one run under Ray and one under torchrun."""
    steps: int = 100
    """Timed steps per run."""
    warmup_steps: int = 15
    """Steps before the timed ones."""
    batch_size: int = 16
    """Images per step, over all workers."""
    num_images: int = 256
    """Images in memory."""
    smoke: bool = False
    """Use tiny sizes, to test the script. The figures then mean nothing."""

    @property
    def threads(self) -> int:
        return self.num_threads or max(1, (cpus() - 1) // self.num_workers)

    def recipe(self) -> CrossAttentionCaptionerRecipe:
        best = tiny(VARIANTS["best"]) if self.smoke else VARIANTS["best"]
        total = self.warmup_steps + self.steps
        train = dataclasses.replace(
            best.train,
            batch_size=self.batch_size,
            num_epochs=total,
            max_steps=total,
            validate_every_epochs=total,
            checkpoint_every_steps=total,
            log_every_steps=1,
        )
        return dataclasses.replace(best, captions_per_image=1, flip=False, train=train)


@dataclasses.dataclass(frozen=True)
class BenchFacts:
    num_train: int


def set_up(job: Job[CrossAttentionCaptionerRecipe], facts: BenchFacts, doing: Doing) -> Setup:
    """Model and rows on a Ray worker, without samples."""
    model, rows = synthetic_training(job.recipe, facts.num_train)
    return Setup(model, rows, lambda model, step: {})


def step_seconds(history: bytes, warmup_steps: int, medians: list[float]) -> float:
    """Mean seconds of a step after the warm-up. The median is appended to `medians`."""
    lines = [json.loads(line) for line in history.splitlines()]
    # The last step has a second line for its validation, with the same time.
    seconds = {row["step"]: row["seconds"] for row in lines}
    timed = [seconds[step] - seconds[step - 1] for step in sorted(seconds) if step > warmup_steps]
    medians.append(statistics.median(timed))
    return statistics.fmean(timed)


def with_ray(bench: OverheadBench, storage: Storage, name: str) -> bytes:
    options = RunOptions(
        storage=storage.uri, name=name, num_workers=bench.num_workers, num_threads=bench.threads, stall_timeout=300.0
    )
    job = Job("bench", "best", bench.recipe(), options)
    try:
        run_training(job, set_up, BenchFacts(bench.num_images))
        return job.run.read("metrics.jsonl")
    finally:
        ray.shutdown()
        job.run.delete_tree()


def with_torchrun(bench: OverheadBench, folder: Path) -> bytes:
    recipe, out = folder / "recipe.json", folder / "history.jsonl"
    recipe.write_text(json.dumps(recipe_to_json(bench.recipe())))
    out.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(bench.num_workers)),
        *(str(ROOT / "jobs" / "bench" / "torchrun_loop.py"), "--recipe", str(recipe), "--out", str(out)),
        *("--num-train", str(bench.num_images), "--num-threads", str(bench.threads)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(bench.threads), "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=_TORCHRUN_TIMEOUT_S, stdout=sys.stderr)
    return out.read_bytes()


def measure(bench: OverheadBench) -> dict[str, Any]:
    medians: dict[str, list[float]] = {"ray": [], "torchrun": []}
    num_runs = 0
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)

        def ray_run() -> float:
            nonlocal num_runs
            num_runs += 1
            history = with_ray(bench, storage, f"run-{num_runs}")
            return step_seconds(history, bench.warmup_steps, medians["ray"])

        def torchrun_run() -> float:
            return step_seconds(with_torchrun(bench, Path(folder)), bench.warmup_steps, medians["torchrun"])

        say(f"{bench.pairs} pairs of {bench.warmup_steps + bench.steps} steps, {bench.threads} threads a worker")
        figures = interleaved("s/step", {"ray": ray_run, "torchrun": torchrun_run}, bench.pairs)
    of_medians = [one / other for one, other in zip(medians["ray"], medians["torchrun"], strict=True)]
    ratio = figures["ratio"]["median"]
    return {
        **verdict("aimed", ratio <= AIMED, AIMED, bench.smoke),
        **verdict("required", ratio <= REQUIRED, REQUIRED, bench.smoke),
        "threads_per_worker": bench.threads,
        "cuda": torch.cuda.is_available(),
        **figures,
        "ratio_of_median_steps": {
            "median": round(statistics.median(of_medians), 5),
            "min": round(min(of_medians), 5),
            "max": round(max(of_medians), 5),
        },
    }


def main() -> None:
    bench = read_settings(OverheadBench, __doc__, "python jobs/bench/ray_train_overhead.py")
    check_batch(bench.recipe().train, bench.num_workers)
    if bench.steps < MIN_STEPS and not bench.smoke:
        raise InputError(f"--steps {bench.steps}: at least {MIN_STEPS} are needed to include occasional work of Ray")
    publish("ray_train_overhead", dataclasses.asdict(bench), lambda: measure(bench))


if __name__ == "__main__":
    run(main)
