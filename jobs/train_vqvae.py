#!/usr/bin/env python
"""Train a VQ-VAE: images to a small grid of codes and back, the space in which latent diffusion works.

Paper: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, with the report's perceptual and PatchGAN losses

    python jobs/train_vqvae.py --variant best --storage URI
    python jobs/train_vqvae.py --variant report --vgg16 FILE --lpips-heads FILE --storage URI

FILE: torchvision's vgg16 weights (a .pth file of its model zoo) and the lpips package's weights v0.1/vgg.

Hardware, time and score, all on one thread of a CPU beside other work (docs/results.md), on validation images:

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 8 minutes for 2,000 steps at commit f786042; PSNR
of 35.1 dB.

Variant best, at 64² with wider levels and 4 epochs: 36 minutes at commit f786042; PSNR 21.6 dB (bicubic 18.8), with all
but a few of the 4,096 codes in use. As it is it has not been run to its end.

Variant report is meant for a GPU and has not been run; the report's own took 60 epochs on one RTX 3090.
"""

from jobs.runtime.autoencoder_training import train_autoencoder
from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.trainer import RunSummary
from mmcore.generators.vqvae import VARIANTS, VQVAERecipe


def train(job: Job[VQVAERecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_autoencoder(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or "", report_needs=" --vgg16 FILE --lpips-heads FILE"))


if __name__ == "__main__":
    run(main)
