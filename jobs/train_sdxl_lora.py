#!/usr/bin/env python
"""Train a LoRA adapter of Stable Diffusion XL: the report's tuning of a pretrained generator.

Paper: SDXL, Podell et al. 2023, https://arxiv.org/abs/2307.01952; LoRA, Hu et al. 2021,
https://arxiv.org/abs/2106.09685

    python jobs/train_sdxl_lora.py --variant report --num-workers 2 --storage URI
    python jobs/generate.py --run URI/runs/sdxl_lora/default --prompts FILE --out URI

Moments of the latents and the text embeddings are computed once and cached. The captions of 8,000 images take 13 GB.
A finished run is a generator. jobs/export.py writes the adapter for diffusers, or in the layout of kohya.

Hardware, time and score: variant report needs a GPU and has not been run. Its frozen weights take 5.1 GB in bf16, its
adapters with their gradients and moments 3 GB. Variant smoke trains a tiny SDXL of random weights in a minute.
"""

from jobs.runtime.commandline import run
from jobs.runtime.job import Job, parse_job
from jobs.runtime.sdxl_training import train_sdxl_lora
from jobs.runtime.trainer import RunSummary
from mmcore.generators.sdxl_lora import VARIANTS, SdxlLoraRecipe


def train(job: Job[SdxlLoraRecipe]) -> RunSummary:
    """Returns the run's summary."""
    return train_sdxl_lora(job)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
