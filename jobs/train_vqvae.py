#!/usr/bin/env python
"""Train a VQ-VAE: images to a small grid of codes and back, the space in which latent diffusion works.

Paper: van den Oord et al. 2017, https://arxiv.org/abs/1711.00937, with the report's perceptual and PatchGAN losses

    python jobs/train_vqvae.py --variant best --storage URI
    python jobs/train_vqvae.py --variant report --vgg16 FILE --lpips-heads FILE --storage URI

FILE: torchvision's vgg16 weights (a .pth file of its model zoo) and the lpips package's weights v0.1/vgg.

Hardware, time and score, all on one thread of a CPU beside other work (README, Results), on validation images:

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 8 minutes for 2,000 steps at commit f786042; PSNR
of 35.1 dB.

Variant best, at 64² with wider levels and 4 epochs: 36 minutes at commit f786042; PSNR 21.6 dB (bicubic 18.8), with all
but a few of the 4,096 codes in use. As it is it has not been run to its end.

Variant report is meant for a GPU and has not been run; the report's own took 60 epochs on one RTX 3090.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.prepare import SHAPES
from jobs.runtime.commandline import run
from jobs.runtime.features import cached_image_column, ensure_dataset
from jobs.runtime.job import Job, RunOptions, parse_job, recipe_name
from jobs.runtime.run_folder import check_new_run
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import run_training
from mmcore.data.columns import default_cache, open_column
from mmcore.data.pixels import PixelRows, to_network, to_pixels
from mmcore.data.prepared import TRAIN, read_captions
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder, sha256_of
from mmcore.frozen.vision import SCRATCH
from mmcore.generators.perceptual import PerceptualDistance
from mmcore.generators.vqvae import LPIPS_NAME, VARIANTS, VQVAEFacts, VQVAERecipe, VQVAETraining, bicubic_psnr
from mmcore.images import image_grid
from mmcore.recipe import recipe_to_json
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.training import num_steps


def default_job(storage: Storage, name: str, variant: str, options: RunOptions | None = None) -> Job[VQVAERecipe]:
    """The job of ``--variant VARIANT --name NAME --storage STORAGE``, for another job that needs a VQ-VAE first.

    `options`: that job's own, for workers, threads and patience.
    """
    options = dataclasses.replace(options or RunOptions(), fresh=False, dry_run=False, stream=False)
    options = dataclasses.replace(options, storage=storage.uri, name=name)
    return Job(recipe_name(__file__), variant, VARIANTS[variant], options)


def setup(job: Job[VQVAERecipe], facts: VQVAEFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker."""
    recipe: VQVAERecipe = job.recipe
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    column = open_column(job.storage / "features" / facts.column, default_cache(), doing=doing)
    rows = PixelRows(table, column, flip=recipe.flip, seed=recipe.train.seed)
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = VQVAETraining(recipe)

    @functools.cache
    def bicubic() -> str:
        originals = rows.pixels(rows.validation, None)
        baseline = bicubic_psnr(originals, recipe.factor)
        return f"PSNR {baseline:.2f} dB by making {len(originals):,} validation images {recipe.factor} times smaller"

    def samples(model: torch.nn.Module, step: int) -> dict[str, Any]:
        assert isinstance(model, VQVAETraining)
        if not recipe.train.num_samples:
            return {}
        originals = rows.pixels(rows.validation[: recipe.train.num_samples], None)
        weight = model.vqvae.quant_conv.weight
        with torch.inference_mode():
            x = to_network(torch.from_numpy(originals).to(weight.device), weight.dtype)
            made = to_pixels(model.vqvae.decode(model.vqvae.encode(x))).cpu().numpy()
        # Originals above their reconstructions.
        grid = image_grid(np.concatenate([originals, made]), len(originals))
        return {"reconstructions": grid, "bicubic": bicubic()}

    return Setup(model, rows, samples)


def describe(job: Job[VQVAERecipe], perceptual: PerceptualDistance | None, num_train: int) -> None:
    """Print sizes and steps, and where the settings depart from the report's."""
    recipe: VQVAERecipe = job.recipe
    model = VQVAETraining(dataclasses.replace(recipe, perceptual=None, vgg16=None, lpips_heads=None))
    trained = sum(parameter.numel() for parameter in model.vqvae.parameters())
    judge = sum(parameter.numel() for parameter in model.discriminator.parameters()) if model.discriminator else 0
    frozen = sum(parameter.numel() for parameter in perceptual.parameters()) if perceptual else 0
    channels, height, width = recipe.latent_shape
    steps_per_epoch, total = num_steps(recipe.train, num_train)
    print(
        f"parameters: {trained / 1e6:.2f} M, discriminator {judge / 1e6:.2f} M, frozen for the perceptual loss "
        f"{frozen / 1e6:.2f} M\n"
        f"images {recipe.image_size}x{recipe.image_size}x3 -> latents {height}x{width}x{channels}, "
        f"{recipe.num_codes:,} codes\n"
        f"steps: {total:,} of {recipe.train.batch_size} images, {steps_per_epoch:,} an epoch",
        flush=True,
    )
    if job.variant == "report":
        print(
            "departures from the report: GroupNorm in the discriminator where it has BatchNorm (no batch statistics); "
            "one more residual block a level in the decoder (diffusers' VQModel); a step is 4 of the report's batches. "
            f"With {recipe.num_heads} heads in its attention it cannot be exported: VQModel has one",
            flush=True,
        )


def dry_run(job: Job[VQVAERecipe], perceptual: PerceptualDistance | None) -> None:
    """Print the resolved recipe and what would be read and written; nothing is written."""
    recipe, storage = job.recipe, job.storage
    makes_shapes = recipe.dataset == SHAPES and not (storage / "data" / SHAPES).exists("_SUCCESS")
    table = None if makes_shapes else read_captions(storage, recipe.dataset, recipe.split)
    print(json.dumps({"recipe": job.recipe_name, "variant": job.variant, **recipe_to_json(recipe)}, indent=1))
    print(f"reads:  {storage}/data/{recipe.dataset}, {storage}/features (pixels, made first where missing)")
    print(f"writes: {job.run}, copies of the pixels in {default_cache()}")
    if table is None:
        print("sizes and steps: known once the Shapes data is made, which this job does first")
    else:
        describe(job, perceptual, len(table.rows(TRAIN)))


def with_absolute_paths(recipe: VQVAERecipe) -> VQVAERecipe:
    """A worker's working directory is not the driver's."""
    files = {name: getattr(recipe, name) for name in ("vgg16", "lpips_heads")}
    absolute: dict[str, Any] = {name: path and str(Path(path).absolute()) for name, path in files.items()}
    if recipe.perceptual not in (None, LPIPS_NAME):
        absolute["perceptual"] = absolute_folder(recipe.perceptual)
    return dataclasses.replace(recipe, **absolute)


def train(job: Job[VQVAERecipe]) -> dict[str, Any]:
    """Make what is missing (Shapes, the column of pixels), then train. Returns the run's summary."""
    check_new_run(job)
    if job.options.stream:
        raise InputError("--stream is for frozen features; a VQ-VAE reads pixels from a copy on the worker's disk")
    recipe = with_absolute_paths(job.recipe)
    job, storage = dataclasses.replace(job, recipe=recipe), job.storage
    perceptual = recipe.build_perceptual()
    if job.options.dry_run:
        dry_run(job, perceptual)
        return {}
    ensure_dataset(storage, recipe.dataset)
    table = read_captions(storage, recipe.dataset, recipe.split)
    num_steps(recipe.train, len(table.rows(TRAIN)))  # too few rows are refused before anything is written
    column = cached_image_column(
        storage,
        recipe.dataset,
        encoder=SCRATCH,
        image_size=recipe.image_size,
        stall_timeout_s=job.options.stall_timeout,
    )
    describe(job, perceptual, len(table.rows(TRAIN)))
    fingerprint = sha256_of(perceptual, None) if perceptual else None
    return run_training(job, setup, VQVAEFacts(table.facts["fingerprint"], column.folder.name, fingerprint))


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or "", report_needs=" --vgg16 FILE --lpips-heads FILE"))


if __name__ == "__main__":
    run(main)
