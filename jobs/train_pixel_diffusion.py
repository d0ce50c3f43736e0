#!/usr/bin/env python
"""Train a diffusion model on pixels: a conditional U-Net, with a frozen or a jointly trained text encoder.

Paper: the report's "our diffusion"; DDPM, Ho et al. 2020, https://arxiv.org/abs/2006.11239

    python jobs/train_pixel_diffusion.py --variant best --storage URI

Hardware, time and score (README, Results):

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 63 minutes for 7,000 steps on one thread of a CPU
beside another training, at commit 144a62c; of the attributes that 500 test prompts name, 65.1 % are in the images.

Variant best has not been run to its end.

Variant report attends at full resolution and needs a GPU; it has not been run. The report says of its own that colours
follow the prompt ("a girl in pink / black / green dress") and that no girl can be recognised.
"""

from typing import Any

from jobs.runtime.commandline import run
from jobs.runtime.diffusion_training import (
    check,
    describe,
    diffusion_setup,
    dry_run,
    open_text,
    text_inputs,
    with_absolute_folders,
    with_text,
)
from jobs.runtime.features import cached_image_column, ensure_dataset
from jobs.runtime.job import Job, parse_job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import run_training
from mmcore.data.prepared import TRAIN, read_captions
from mmcore.frozen.vision import SCRATCH
from mmcore.generators.denoiser import DiffusionFacts
from mmcore.generators.pixel_diffusion import VARIANTS, PixelDiffusionRecipe


def setup(job: Job[PixelDiffusionRecipe], facts: DiffusionFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker."""
    return diffusion_setup(job, facts, doing)


def train(job: Job[PixelDiffusionRecipe]) -> dict[str, Any]:
    """Make what is missing (Shapes, pixels, the frozen encoder's hidden states), then train. Returns the summary."""
    check(job)
    job = with_absolute_folders(job)
    recipe, storage = job.recipe, job.storage
    x_0_shape = (3, recipe.image_size, recipe.image_size)
    if job.options.dry_run:
        dry_run(job, x_0_shape, recipe.text.text_encoder)
        return {}
    ensure_dataset(storage, recipe.dataset)
    table = read_captions(storage, recipe.dataset, recipe.split)
    num_train = len(table.rows(TRAIN))
    text = open_text(recipe, table)
    describe(job, text, x_0_shape, num_train)  # what cannot be is refused before anything is encoded
    if job.variant == "report":
        print("the report trains in fp16; --precision auto is bf16 where the device has it, else fp32", flush=True)
    column = cached_image_column(
        storage,
        recipe.dataset,
        encoder=SCRATCH,
        image_size=recipe.image_size,
        stall_timeout_s=job.options.stall_timeout,
    )
    facts = DiffusionFacts(
        text_inputs(text),
        x_0_shape,
        recipe.image_size,
        dataset_fingerprint=table.facts["fingerprint"],
        columns=(column.folder.name,),
    )
    return run_training(job, setup, with_text(job, facts, table, text))


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
