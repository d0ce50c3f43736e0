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
from mmcore.captioners.facts import CaptionerFacts


def remark(job: Job[CrossAttentionCaptionerRecipe], facts: CaptionerFacts, num_frozen: int) -> None:
    """Print why the published sizes are not met."""
    if job.variant == "report":
        print(
            "Table 1 gives this row a width of 768 and the 21.5 M of row 1. A decoder of width 768 has 47 M in its six "
            f"layers alone, so the width here is row 1's {job.recipe.width}. The frozen encoder has "
            f"{num_frozen / 1e6:.1f} M.",
            flush=True,
        )


def train(job: Job[CrossAttentionCaptionerRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_captioner(job, remark)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
