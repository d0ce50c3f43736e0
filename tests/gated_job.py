"""A job behind the gate in the folder that the variable GATE names: `python tests/gated_job.py JOB FLAGS`.

Captions (the job `caption`) wait before each block of images, and trainings before each report of a step.
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

# Read by the driver: its workers are told by what they are sent, in a Ray of other environment too.
GATE = os.environ.get("GATE", "")


class GatedCaptions(CaptionImages):
    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        Gate(GATE).begin(rows["image_id"][0])
        return super().__call__(rows)


def gated(setup: Callable[..., Setup]) -> Callable[..., Setup]:
    def gated_setup(job: Job[Any], facts: Any, doing: Doing) -> Setup:
        """Called on each worker, before it trains."""
        gate, report = Gate(GATE), ray.train.report
        is_first = ray.train.get_context().get_world_rank() == 0

        def report_once_allowed(metrics: dict[str, Any], **checkpoint: Any) -> None:
            nonlocal is_first
            if is_first:  # of its group, at its first report
                gate.arrive()
                is_first = False
            gate.wait(metrics["step"])
            report(metrics, **checkpoint)

        ray.train.report = report_once_allowed
        return setup(job, facts, doing)

    return gated_setup


def main() -> None:
    module: Any = importlib.import_module(f"jobs.{sys.argv.pop(1)}")
    if module is jobs.caption:
        module.CaptionImages = GatedCaptions
    else:
        run_training = training_flow.run_training
        training_flow.run_training = lambda job, setup, *more: run_training(job, gated(setup), *more)
    module.main()


if __name__ == "__main__":
    run(main)
