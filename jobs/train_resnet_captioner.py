#!/usr/bin/env python
"""Train a captioner: a frozen image encoder, cross-attention, a Transformer decoder over words.

Paper: row 1 of the report's Table 1 (ResNet-18); decoder of Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    python jobs/train_resnet_captioner.py --variant best --storage URI --encoder NAME_OR_FOLDER

Hardware: any. `shapes` takes 10 minutes on two CPU cores; `best` on Flickr8k 40, of which the encoder half, once.
"""

from jobs.runtime.captioner_training import train_captioner
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.captioners.cross_attention import VARIANTS, CrossAttentionCaptionerRecipe


def train(job: Job[CrossAttentionCaptionerRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
