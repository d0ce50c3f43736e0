"""What the jobs that train a diffusion model share: what is refused and printed, the rows, the sample images."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jobs.runtime.generator_training import Text, read_prompts, sample_grids, text_assets, text_sizes
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.training_flow import parameters, say_sizes, say_steps
from mmcore.data.columns import default_cache, open_column
from mmcore.data.prepared import read_captions
from mmcore.generators.denoiser import Denoiser
from mmcore.generators.diffusion import check_timesteps
from mmcore.generators.diffusion_recipe import DiffusionRecipe
from mmcore.generators.diffusion_rows import GenerationRows
from mmcore.generators.facts import DiffusionFacts
from mmcore.rows import Batch
from mmcore.seeding import derive_seed
from mmcore.storage import Storage


def check_sampling(job: Job[Any]) -> None:
    """Raise InputError for a number of sampling steps that the noise schedule does not have."""
    check_timesteps("ddim", job.recipe.noise.num_timesteps, job.recipe.sample_steps)


def describe(job: Job[Any], facts: DiffusionFacts, text: Text, num_train: int) -> None:
    """Print sizes and steps. Raises InputError for a network that does not fit its samples, or for too few rows."""
    recipe: DiffusionRecipe = job.recipe
    with torch.device("meta"):
        model = recipe.build(facts)
    unet = f"the U-Net on {' x '.join(map(str, facts.x_0_shape))}"
    say_sizes(job, {unet: parameters(model.unet), **text_sizes(model.text, text)})
    say_steps(job, num_train)


def diffusion_setup(
    job: Job[Any],
    facts: DiffusionFacts,
    doing: Doing,
    images: Callable[[Tensor], Tensor] | None = None,
    assets: dict[str, Storage] | None = None,
) -> Setup:
    """Model and rows, on a worker. `images` makes of x_0 images in [-1, 1]; None where x_0 is the image itself."""
    recipe: DiffusionRecipe = job.recipe
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    rows = GenerationRows(
        table,
        [open_column(job.storage / "features" / key, default_cache(), doing=doing) for key in facts.columns],
        read_prompts(job, facts, table, doing),
        captions_per_image=recipe.captions_per_image,
        drop_text=recipe.drop_text,
        flip=recipe.flip,
        noise=recipe.noise,
        scaling_factor=facts.scaling_factor,
        seed=recipe.train.seed,
    )
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)

    def made(model: Denoiser, prompts: Batch, null: Batch, seeds: list[int]) -> Tensor:
        x_0 = model.generate(
            prompts,
            null,
            seeds,
            num_inference_steps=recipe.sample_steps,
            guidance_scale=recipe.sample_guidance,
            clip=images is None,
        )
        return x_0 if images is None else images(x_0)

    samples = sample_grids(recipe, table, rows.validation, rows.prompts, made)
    return Setup(model, rows, samples, {**(assets or {}), **text_assets(job, facts)})
