"""How an autoencoder is trained: pixels, reconstructions of validation images, what is printed."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from jobs.runtime.features import cached_pixels
from jobs.runtime.job import Job, RunOptions
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, Flow, parameters, say_sizes, say_steps, train_by
from mmcore.catalogue import RECIPES
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.pixels import PixelRows
from mmcore.data.prepared import CaptionTable, read_captions
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder, sha256_of
from mmcore.generators.autoencoder_training import LPIPS_NAME, AutoencoderTraining, build_perceptual
from mmcore.generators.facts import AutoencoderFacts
from mmcore.generators.infinity_tokenizer import InfinityTokenizerRecipe
from mmcore.generators.perceptual import PerceptualDistance
from mmcore.generators.psnr import bicubic_psnr
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.images import image_grid
from mmcore.seeding import derive_seed
from mmcore.storage import Storage

R = TypeVar("R", VQVAERecipe, InfinityTokenizerRecipe)


def train_autoencoder(job: Job[R]) -> RunSummary:
    """Make what is missing (Shapes, the column of pixels), then train. Returns the run's summary."""
    return train_by(Flow(_check, _plan, describe, _encode, _columns, setup, writes=""), job)


def default_job(
    recipe_name: str, storage: Storage, name: str, variant: str, options: RunOptions | None = None
) -> Job[Any]:
    """The job of ``--variant VARIANT --name NAME --storage STORAGE``, for another job that needs its result first.

    `options`: that job's own, for workers, threads and patience.
    """
    options = dataclasses.replace(options or RunOptions(), fresh=False, dry_run=False, stream=False)
    options = dataclasses.replace(options, storage=storage.uri, name=name)
    return Job(recipe_name, variant, RECIPES[recipe_name].variants[variant], options)


def with_absolute_paths(recipe: R) -> R:
    """A worker's working directory is not the driver's."""
    files = {name: getattr(recipe, name) for name in ("vgg16", "lpips_heads")}
    absolute: dict[str, Any] = {name: path and str(Path(path).absolute()) for name, path in files.items()}
    if recipe.perceptual not in (None, LPIPS_NAME):
        absolute["perceptual"] = absolute_folder(recipe.perceptual)
    return dataclasses.replace(recipe, **absolute)


def _check(job: Job[R]) -> Job[R]:
    if job.options.stream:
        raise InputError(
            "--stream is for frozen features; an autoencoder reads pixels from a copy on the worker's disk"
        )
    job = dataclasses.replace(job, recipe=with_absolute_paths(job.recipe))
    _perceptual(job.recipe)
    return job


@functools.lru_cache(maxsize=1)
def _perceptual(recipe: VQVAERecipe | InfinityTokenizerRecipe) -> PerceptualDistance | None:
    return build_perceptual(recipe)


def _plan(job: Job[R], table: CaptionTable) -> AutoencoderFacts:
    perceptual = _perceptual(job.recipe)
    facts_type: type[AutoencoderFacts] = RECIPES[job.recipe_name].facts_type
    return facts_type(
        dataset_fingerprint=table.facts.get("fingerprint", ""),
        perceptual_fingerprint=None if perceptual is None else sha256_of(perceptual, None),
    )


def describe(job: Job[R], facts: AutoencoderFacts, num_train: int) -> None:
    """Print sizes and steps, and where the settings depart from the report's."""
    recipe = job.recipe
    with torch.device("meta"):
        model = dataclasses.replace(recipe, perceptual=None, vgg16=None, lpips_heads=None).build_training()
    channels, height, width = recipe.latent_shape
    is_vqvae = isinstance(recipe, VQVAERecipe)
    say_sizes(
        job,
        {
            "the VQ-VAE" if is_vqvae else "the tokenizer": parameters(model.autoencoder),
            "the discriminator": parameters(model.discriminator),
            "the frozen network of the perceptual loss": parameters(_perceptual(recipe)),
        },
    )
    if isinstance(recipe, VQVAERecipe):
        made = f"{recipe.num_codes:,} codes"
    else:
        num_tokens = sum(side * side for side in recipe.grids)
        made = f"{num_tokens} tokens of {recipe.num_bits} bits on grids of sides {', '.join(map(str, recipe.grids))}"
    size = recipe.image_size
    print(f"images {size}x{size}x3 -> latents {height}x{width}x{channels}, {made}", flush=True)
    say_steps(job, num_train)
    if isinstance(recipe, VQVAERecipe) and job.variant == "report":
        print(
            "departures from the report: GroupNorm in the discriminator where it has BatchNorm (no batch statistics); "
            "one more residual block a level in the decoder (diffusers' VQModel); a step is 4 of the report's batches. "
            f"With {recipe.num_heads} heads in its attention it cannot be exported: VQModel has one",
            flush=True,
        )


def _encode(job: Job[R], table: CaptionTable, facts: AutoencoderFacts) -> Encoded[R, AutoencoderFacts]:
    return Encoded(job, dataclasses.replace(facts, column=cached_pixels(job).folder.name))


def _columns(job: Job[R], facts: AutoencoderFacts) -> dict[str, TensorSpec]:
    return {"pixels": TensorSpec("uint8", (job.recipe.image_size, job.recipe.image_size, 3))}


def setup(job: Job[R], facts: AutoencoderFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker."""
    recipe = job.recipe
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    column = open_column(job.storage / "features" / facts.column, default_cache(), doing=doing)
    rows = PixelRows(table, column, flip=recipe.flip, seed=recipe.train.seed)
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build_training()

    @functools.cache
    def bicubic() -> str:
        originals = rows.pixels(rows.validation, None)
        baseline = bicubic_psnr(originals, recipe.factor)
        return f"PSNR {baseline:.2f} dB by making {len(originals):,} validation images {recipe.factor} times smaller"

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        assert isinstance(model, AutoencoderTraining)
        if not recipe.train.num_samples:
            return {}
        originals = rows.pixels(rows.validation[: recipe.train.num_samples], None)
        made = model.reconstruct(torch.from_numpy(originals)).numpy()
        # Originals above their reconstructions.
        grid = image_grid(np.concatenate([originals, made]), len(originals))
        return {"reconstructions": grid, "bicubic": bicubic()}

    return Setup(model, rows, samples)
