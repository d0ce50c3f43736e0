"""How a VQ-VAE is trained: pixels, reconstructions of validation images, what is printed."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jobs.runtime.features import cached_pixels
from jobs.runtime.job import Job, RunOptions
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, Flow, parameters, say_sizes, say_steps, train_by
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.pixels import PixelRows, to_network, to_pixels
from mmcore.data.prepared import CaptionTable, read_captions
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder, sha256_of
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.perceptual import PerceptualDistance
from mmcore.generators.psnr import bicubic_psnr
from mmcore.generators.vqvae import LPIPS_NAME, VARIANTS, VQVAERecipe, VQVAETraining
from mmcore.images import image_grid
from mmcore.seeding import derive_seed
from mmcore.storage import Storage

RECIPE_NAME = "vqvae"


def train_vqvae(job: Job[VQVAERecipe]) -> RunSummary:
    """Make what is missing (Shapes, the column of pixels), then train. Returns the run's summary."""
    return train_by(Flow(_check, _plan, describe, _encode, _columns, setup, writes=""), job)


def default_job(storage: Storage, name: str, variant: str, options: RunOptions | None = None) -> Job[VQVAERecipe]:
    """The job of ``--variant VARIANT --name NAME --storage STORAGE``, for another job that needs a VQ-VAE first.

    `options`: that job's own, for workers, threads and patience.
    """
    options = dataclasses.replace(options or RunOptions(), fresh=False, dry_run=False, stream=False)
    options = dataclasses.replace(options, storage=storage.uri, name=name)
    return Job(RECIPE_NAME, variant, VARIANTS[variant], options)


def with_absolute_paths(recipe: VQVAERecipe) -> VQVAERecipe:
    """A worker's working directory is not the driver's."""
    files = {name: getattr(recipe, name) for name in ("vgg16", "lpips_heads")}
    absolute: dict[str, Any] = {name: path and str(Path(path).absolute()) for name, path in files.items()}
    if recipe.perceptual not in (None, LPIPS_NAME):
        absolute["perceptual"] = absolute_folder(recipe.perceptual)
    return dataclasses.replace(recipe, **absolute)


def _check(job: Job[VQVAERecipe]) -> Job[VQVAERecipe]:
    if job.options.stream:
        raise InputError("--stream is for frozen features; a VQ-VAE reads pixels from a copy on the worker's disk")
    job = dataclasses.replace(job, recipe=with_absolute_paths(job.recipe))
    _perceptual(job.recipe)
    return job


@functools.lru_cache(maxsize=1)
def _perceptual(recipe: VQVAERecipe) -> PerceptualDistance | None:
    return recipe.build_perceptual()


def _plan(job: Job[VQVAERecipe], table: CaptionTable) -> VQVAEFacts:
    perceptual = _perceptual(job.recipe)
    return VQVAEFacts(
        dataset_fingerprint=table.facts.get("fingerprint", ""),
        perceptual_fingerprint=None if perceptual is None else sha256_of(perceptual, None),
    )


def describe(job: Job[VQVAERecipe], facts: VQVAEFacts, num_train: int) -> None:
    """Print sizes and steps, and where the settings depart from the report's."""
    recipe = job.recipe
    model = VQVAETraining(dataclasses.replace(recipe, perceptual=None, vgg16=None, lpips_heads=None))
    channels, height, width = recipe.latent_shape
    say_sizes(
        job,
        {
            "the VQ-VAE": parameters(model.vqvae),
            "the discriminator": parameters(model.discriminator),
            "the frozen network of the perceptual loss": parameters(_perceptual(recipe)),
        },
    )
    print(
        f"images {recipe.image_size}x{recipe.image_size}x3 -> latents {height}x{width}x{channels}, "
        f"{recipe.num_codes:,} codes",
        flush=True,
    )
    say_steps(job, num_train)
    if job.variant == "report":
        print(
            "departures from the report: GroupNorm in the discriminator where it has BatchNorm (no batch statistics); "
            "one more residual block a level in the decoder (diffusers' VQModel); a step is 4 of the report's batches. "
            f"With {recipe.num_heads} heads in its attention it cannot be exported: VQModel has one",
            flush=True,
        )


def _encode(job: Job[VQVAERecipe], table: CaptionTable, facts: VQVAEFacts) -> Encoded[VQVAERecipe, VQVAEFacts]:
    return Encoded(job, dataclasses.replace(facts, column=cached_pixels(job).folder.name))


def _columns(job: Job[VQVAERecipe], facts: VQVAEFacts) -> dict[str, TensorSpec]:
    return {"pixels": TensorSpec("uint8", (job.recipe.image_size, job.recipe.image_size, 3))}


def setup(job: Job[VQVAERecipe], facts: VQVAEFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker."""
    recipe = job.recipe
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

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
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
