#!/usr/bin/env python
"""Train a Q-Former on a frozen image encoder: by contrast, matching and generation.

Paper: row 3 of the report's Table 1; BLIP-2's first stage, Li et al. 2023, https://arxiv.org/abs/2301.12597

    python jobs/train_qformer.py --variant best --storage URI --encoder NAME_OR_FOLDER --text-model NAME_OR_FOLDER

Hardware: any. The text model is a BERT, which gives tokenizer, sizes and first weights; `scratch` has its own.
"""

from jobs.runtime.captioner_training import train_captioner
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.captioners.matching_rows import MatchingRows
from mmcore.captioners.qformer_captioner import VARIANTS, QFormerRecipe


def train(job: Job[QFormerRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job, rows_type=MatchingRows)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
