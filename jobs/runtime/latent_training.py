"""How a diffusion model on latents is trained: those of a frozen VQ-VAE, scaled to the deviation of noise."""

import dataclasses

from torch import Tensor

from jobs.runtime.diffusion_training import check_sampling, describe, diffusion_setup
from jobs.runtime.frozen_autoencoder import VQVAE
from jobs.runtime.generator_training import GeneratorKind, train_generator
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded, with_mirrored
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.frozen.text import TextInputs
from mmcore.generators.diffusion_rows import scaling_factor
from mmcore.generators.facts import DiffusionFacts
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe

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
    encoded = VQVAE.encode(job, facts, output="latents", fact="vqvae_fingerprint")
    some = [table.image_ids[row] for row in table.rows(TRAIN)[:_SCALE_IMAGES]]
    latents = open_column(job.storage / "features" / encoded.facts.columns[0], default_cache(), some).values
    facts = dataclasses.replace(encoded.facts, scaling_factor=scaling_factor(latents))
    return dataclasses.replace(encoded, facts=facts)


def _columns(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts) -> dict[str, TensorSpec]:
    return with_mirrored({"latents": TensorSpec("float16", facts.x_0_shape)}, job.recipe.flip)


def setup(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker; the VQ-VAE is loaded where samples are first decoded."""
    assert job.recipe.vqvae is not None
    assert facts.vqvae_fingerprint is not None
    vqvae = VQVAE.frozen(job.recipe.vqvae, facts.vqvae_fingerprint)

    def images(latents: Tensor) -> Tensor:
        return vqvae.on(str(latents.device)).decode(latents / facts.scaling_factor)

    made = diffusion_setup(job, facts, doing, images, vqvae.assets)
    return dataclasses.replace(made, check_assets=vqvae.check_copy)
