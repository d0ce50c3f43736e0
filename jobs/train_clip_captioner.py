#!/usr/bin/env python
"""Train a captioner on CLIP's image encoder: cross-attention, a Transformer decoder over words.

Paper: row 2 of the report's Table 1; CLIP of Radford et al. 2021, https://arxiv.org/abs/2103.00020

    python jobs/train_clip_captioner.py --variant best --storage URI --encoder NAME_OR_FOLDER --tokens patch

Hardware: any. `report` reads one pooled vector an image; `best` reads a token for each of CLIP's 49 patches.
"""

from jobs.runtime.captioner_training import train_captioner
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.captioners.clip_captioner import VARIANTS
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe


def train(job: Job[CrossAttentionCaptionerRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
