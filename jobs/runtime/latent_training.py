"""How a diffusion model on latents is trained: those of a frozen VQ-VAE, scaled to the deviation of noise."""

import dataclasses

from torch import Tensor

from jobs.runtime.diffusion_training import check_sampling, describe, diffusion_setup
from jobs.runtime.features import cached_autoencoder_column
from jobs.runtime.frozen_autoencoder import VQVAE
from jobs.runtime.generator_training import GeneratorKind, train_generator
from jobs.runtime.job import Job
from jobs.runtime.run_folder import check_begun
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.frozen.text import TextInputs
from mmcore.generators.diffusion_rows import scaling_factor
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.trained.autoencoder import open_autoencoder

# Images whose latents say by what all are scaled: a million numbers at the smallest size.
_SCALE_IMAGES = 1024


def train_latent_diffusion(job: Job[LatentDiffusionRecipe]) -> RunSummary:
    """Make what is missing (Shapes, the VQ-VAE, latents, hidden states), then train. Returns the run's summary."""
    kind = GeneratorKind(_facts, describe, _encode, _columns, setup, reads=VQVAE.reads, check=_check)
    return train_generator(job, kind)


def _check(job: Job[LatentDiffusionRecipe]) -> None:
    VQVAE.recipe(job)
    check_sampling(job)
    VQVAE.say(job)


def _facts(job: Job[LatentDiffusionRecipe], inputs: TextInputs) -> DiffusionFacts:
    vqvae = VQVAE.recipe(job)
    if vqvae.num_heads > 1:
        print(
            f"the VQ-VAE has {vqvae.num_heads} heads in its attention: what is trained on it cannot be exported, as "
            "diffusers' VQModel has one; train one with --num-heads 1 or 0 if it is to be",
            flush=True,
        )
    return DiffusionFacts(inputs, vqvae.latent_shape, vqvae.image_size)


def _encode(
    job: Job[LatentDiffusionRecipe], table: CaptionTable, facts: DiffusionFacts
) -> Encoded[LatentDiffusionRecipe, DiffusionFacts]:
    run = VQVAE.ensure(job)
    fingerprint = open_autoencoder(run.uri).load().fingerprint()
    facts = dataclasses.replace(facts, vqvae_fingerprint=fingerprint)
    check_begun(job, facts)
    recipe = dataclasses.replace(job.recipe, vqvae=run.uri)
    columns = [
        cached_autoencoder_column(
            job.storage,
            recipe.dataset,
            output="latents",
            run=run,
            fingerprint=fingerprint,
            flip=flip,
            num_views=1 + recipe.flip,
            stall_timeout_s=job.options.stall_timeout,
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    some = [table.image_ids[row] for row in table.rows(TRAIN)[:_SCALE_IMAGES]]
    facts = dataclasses.replace(
        facts,
        scaling_factor=scaling_factor(open_column(columns[0].folder, default_cache(), some).values),
        columns=tuple(column.folder.name for column in columns),
    )
    return Encoded(dataclasses.replace(job, recipe=recipe), facts)


def _columns(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts) -> dict[str, TensorSpec]:
    spec = TensorSpec("float16", facts.x_0_shape)
    return {"latents": spec, "mirrored_latents": spec} if job.recipe.flip else {"latents": spec}


def setup(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker; the VQ-VAE is loaded where samples are first decoded."""
    assert job.recipe.vqvae is not None
    assert facts.vqvae_fingerprint is not None
    vqvae = VQVAE.frozen(job.recipe.vqvae, facts.vqvae_fingerprint)

    def images(latents: Tensor) -> Tensor:
        return vqvae.on(str(latents.device)).decode(latents / facts.scaling_factor)

    made = diffusion_setup(job, facts, doing, images, vqvae.assets)
    return dataclasses.replace(made, check_assets=vqvae.check_copy)
