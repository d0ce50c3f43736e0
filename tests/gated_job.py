"""A job behind the gate in the folder that the variable GATE names: `python tests/gated_job.py caption|train FLAGS`.

Captions wait before each block of images, and the training of a captioner before each report of a step.
"""

import os
import sys
from typing import Any

import pyarrow as pa
import ray.train
from gate import Gate

import jobs.caption
import jobs.train_resnet_captioner
from jobs.caption import CaptionImages
from jobs.commandline import run
from jobs.train_resnet_captioner import setup
from jobs.train_worker import Doing, Setup
from jobs.trainer import Job


class GatedCaptions(CaptionImages):
    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        Gate(os.environ["GATE"]).begin(rows["image_id"][0])
        return super().__call__(rows)


def gated_setup(job: Job, facts: dict[str, Any], doing: Doing) -> Setup:
    """Called on each worker, before it trains."""
    gate, report = Gate(os.environ["GATE"]), ray.train.report

    def report_once_allowed(metrics: dict[str, Any], **checkpoint: Any) -> None:
        gate.wait(metrics["step"])
        report(metrics, **checkpoint)

    ray.train.report = report_once_allowed
    return setup(job, facts, doing)


def main() -> None:
    if sys.argv.pop(1) == "caption":
        jobs.caption.CaptionImages = GatedCaptions  # type: ignore[misc]
        jobs.caption.main()
    else:
        jobs.train_resnet_captioner.setup = gated_setup
        jobs.train_resnet_captioner.main()


if __name__ == "__main__":
    run(main)
