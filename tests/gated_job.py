"""Run a job with the gate of the folder in the variable GATE: `python tests/gated_job.py JOB FLAGS`.

The job `caption` waits before each block of images, a training before each report of a step.
"""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray.train
from gate import Gate

import jobs.caption
from jobs.caption import CaptionImages
from jobs.runtime import training_flow
from jobs.runtime.commandline import run
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup

# Read in the driver. Workers get it with the objects sent to them, also in a Ray with another environment.
GATE = os.environ.get("GATE", "")


class GatedCaptions(CaptionImages):
    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        Gate(GATE).begin(rows["image_id"][0])
        return super().__call__(rows)


def gated(setup: Callable[..., Setup]) -> Callable[..., Setup]:
    def gated_setup(job: Job[Any], facts: Any, doing: Doing) -> Setup:
        """Called on each worker before it trains."""
        gate, report = Gate(GATE), ray.train.report
        is_first = ray.train.get_context().get_world_rank() == 0

        def report_once_allowed(metrics: dict[str, Any], **checkpoint: Any) -> None:
            nonlocal is_first
            if is_first:  # the first report of its group
                gate.arrive()
                is_first = False
            gate.wait(metrics["step"])
            report(metrics, **checkpoint)

        ray.train.report = report_once_allowed
        return setup(job, facts, doing)

    return gated_setup


def main() -> None:
    name = sys.argv.pop(1)
    # The command that an interrupted job names.
    sys.argv[0] = f"jobs/{name}.py"
    module: Any = importlib.import_module(f"jobs.{name}")
    if module is jobs.caption:
        module.CaptionImages = GatedCaptions
    else:
        run_training = training_flow.run_training
        training_flow.run_training = lambda job, setup, *more: run_training(job, gated(setup), *more)
    module.main()


if __name__ == "__main__":
    run(main)
