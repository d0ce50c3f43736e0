#!/usr/bin/env python
"""Train a diffusion model on pixels: a conditional U-Net, with a frozen or a jointly trained text encoder.

Paper: the report's "our diffusion"; DDPM, Ho et al. 2020, https://arxiv.org/abs/2006.11239

    python jobs/train_pixel_diffusion.py --variant best --storage URI

Hardware, time and score (docs/results.md):

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 63 minutes for 7,000 steps on one thread of a CPU
beside another training, at commit 144a62c; of the attributes that 500 test prompts name, 65.1 % are in the images.

Variant best has not been run to its end.

Variant report attends at full resolution and needs a GPU; it has not been run. In the report's own images colours
follow the prompt ("a girl in pink / black / green dress"), but no girl can be recognised.
"""

from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.pixel_training import train_pixel_diffusion
from jobs.runtime.trainer import RunSummary
from mmcore.generators.pixel_diffusion import VARIANTS, PixelDiffusionRecipe


def train(job: Job[PixelDiffusionRecipe]) -> RunSummary:
    """Returns the run's summary."""
    if job.variant == "report":
        print("the report trains in fp16; --precision auto is bf16 where the device has it, else fp32", flush=True)
    return train_pixel_diffusion(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
