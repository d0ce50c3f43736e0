#!/usr/bin/env python
"""Train a latent diffusion model: a conditional U-Net on the latents of a frozen VQ-VAE.

Paper: the report's VQ-VAE + latent diffusion; Rombach et al. 2022, https://arxiv.org/abs/2112.10752

    python jobs/train_ldm.py --variant best --storage URI --vqvae URI/runs/vqvae/NAME

Without --vqvae the VQ-VAE of the same variant (not of `report`) and name is trained first, into the same storage.

Hardware, time and score, all on one thread of a CPU beside other work (docs/results.md):

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 89 minutes for 7,000 steps at commit 96025d9,
without its VQ-VAE; of the attributes that 500 test prompts name, 66.3 % are in the images.

Variant best has not been run to its end. Smaller, at 64² and with 8 epochs: 46 minutes at commit 96025d9; the named
colour wins in 41.1 % of 90 images, where chance is 33 %.

Variant report is meant for a GPU and has not been run.
"""

from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.latent_training import train_latent_diffusion
from jobs.runtime.trainer import RunSummary
from mmcore.generators.latent_diffusion import VARIANTS, LatentDiffusionRecipe


def train(job: Job[LatentDiffusionRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_latent_diffusion(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or "", report_needs=" --vqvae URI"))


if __name__ == "__main__":
    run(main)
