#!/usr/bin/env python
"""Train a contrastive pair: an image tower and a text tower that put what belongs together side by side.

Paper: CLIP, Radford et al. 2021, https://arxiv.org/abs/2103.00020

    python jobs/train_clip.py --variant best --storage URI --encoder NAME_OR_FOLDER --text-encoder NAME_OR_FOLDER

Hardware: any. A text encoder that is named gives the first weights; with --no-train-text-encoder it stays as it is.
evaluate.py retrieval scores the result.
"""

from jobs.runtime.captioner_training import train_captioner
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.captioners.contrastive import VARIANTS, ContrastiveRecipe
from mmcore.captioners.matching_rows import MatchingRows


def train(job: Job[ContrastiveRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job, rows_type=MatchingRows)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
