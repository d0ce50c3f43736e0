"""How a diffusion model on latents is trained: its VQ-VAE, named or trained first, and the latents."""

import dataclasses
import functools

from torch import Tensor

from jobs.runtime.diffusion_training import Samples, diffusion_setup, train_diffusion
from jobs.runtime.features import cached_latent_column
from jobs.runtime.job import Job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import Encoded
from jobs.runtime.vqvae_training import default_job, train_vqvae
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.errors import InputError
from mmcore.frozen.text import TextInputs
from mmcore.generators.diffusion_rows import scaling_factor
from mmcore.generators.facts import DiffusionFacts, VQVAEFacts
from mmcore.generators.latent_diffusion import LatentDiffusionRecipe
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.recipe import difference, recipe_to_json
from mmcore.run_files import VQVAE_ASSET, read_begun
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder

# Images whose latents say by what all are scaled: a million numbers at the smallest size.
_SCALE_IMAGES = 1024


def train_latent_diffusion(job: Job[LatentDiffusionRecipe]) -> RunSummary:
    """Make what is missing (Shapes, the VQ-VAE, latents, hidden states), then train. Returns the run's summary."""
    return train_diffusion(job, Samples(_facts, _encode, _columns, setup, _reads, vqvae_recipe))


# -- the VQ-VAE ----------------------------------------------------------------------------------------------------


def vqvae_job(job: Job[LatentDiffusionRecipe]) -> Job[VQVAERecipe]:
    """The training of the VQ-VAE that belongs to `job` where it names none: same variant, name, data and machines.

    Raises InputError for a variant whose VQ-VAE needs weights that this job does not ask for.
    """
    own = default_job(job.storage, job.options.name, job.variant, job.options)
    if own.recipe.perceptual is not None:
        raise InputError(
            f"--vqvae is missing: the VQ-VAE of `{job.variant}` is trained with a perceptual loss whose weights are "
            f"files of yours; run `python jobs/train_vqvae.py --variant {job.variant} --storage {job.storage} ...` "
            "first, and name its run"
        )
    recipe = dataclasses.replace(own.recipe, dataset=job.recipe.dataset, split=job.recipe.split)
    return dataclasses.replace(own, recipe=recipe)


def ensure_vqvae(job: Job[LatentDiffusionRecipe]) -> Storage:
    """The run of the VQ-VAE: the one that `job` names, or else its own, trained now unless it is finished.

    Raises InputError where its own is finished with other settings.
    """
    if job.recipe.vqvae is not None:
        return Storage(job.recipe.vqvae)
    own = vqvae_job(job)
    if not own.run.exists("_SUCCESS"):
        print(f"no --vqvae given: training {own.run} first", flush=True)
        try:
            train_vqvae(own)
        except InputError as error:
            # The flags that would mend it are those of the other job.
            raise InputError(
                f"the VQ-VAE {own.run}: {error} (train it with jobs/train_vqvae.py, then name it with --vqvae)"
            ) from error
        return own.run
    # A field that is younger than the run has its default, which is how the run was trained.
    there = read_begun(own.run, VQVAERecipe, VQVAEFacts).recipe
    differences = difference(recipe_to_json(own.recipe), recipe_to_json(there))
    if differences:
        raise InputError(
            f"{own.run} is finished with other settings: {'; '.join(differences[:5])}; name it with --vqvae if it is "
            "the one you mean, or give another --name"
        )
    print(f"no --vqvae given: taking the finished {own.run}", flush=True)
    return own.run


# -- the latents ---------------------------------------------------------------------------------------------------


def vqvae_recipe(job: Job[LatentDiffusionRecipe]) -> VQVAERecipe:
    """The settings of the VQ-VAE that `job` names, or else of its own, which may be yet to be trained."""
    return vqvae_job(job).recipe if job.recipe.vqvae is None else open_autoencoder(job.recipe.vqvae).recipe


def _facts(job: Job[LatentDiffusionRecipe], inputs: TextInputs) -> DiffusionFacts:
    vqvae = vqvae_recipe(job)
    if vqvae.num_heads > 1:
        print(
            f"the VQ-VAE has {vqvae.num_heads} heads in its attention: what is trained on it cannot be exported, as "
            "diffusers' VQModel has one; train one with --num-heads 1 or 0 if it is to be",
            flush=True,
        )
    return DiffusionFacts(inputs, vqvae.latent_shape, vqvae.image_size)


def _reads(job: Job[LatentDiffusionRecipe]) -> str:
    return job.recipe.vqvae or f"{vqvae_job(job).run} (trained first where missing)"


def _encode(
    job: Job[LatentDiffusionRecipe], table: CaptionTable, facts: DiffusionFacts
) -> Encoded[LatentDiffusionRecipe, DiffusionFacts]:
    run = ensure_vqvae(job)
    recipe = dataclasses.replace(job.recipe, vqvae=run.uri)
    columns = [
        cached_latent_column(
            job.storage, recipe.dataset, vqvae=run, flip=flip, stall_timeout_s=job.options.stall_timeout
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    some = [table.image_ids[row] for row in table.rows(TRAIN)[:_SCALE_IMAGES]]
    facts = dataclasses.replace(
        facts,
        scaling_factor=scaling_factor(open_column(columns[0].folder, default_cache(), some).values),
        vqvae_fingerprint=columns[0].encoder_fingerprint,
        columns=tuple(column.folder.name for column in columns),
    )
    return Encoded(dataclasses.replace(job, recipe=recipe), facts)


def _columns(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts) -> dict[str, TensorSpec]:
    spec = TensorSpec("float16", facts.x_0_shape)
    return {"latents": spec, "mirrored_latents": spec} if job.recipe.flip else {"latents": spec}


def setup(job: Job[LatentDiffusionRecipe], facts: DiffusionFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker; the VQ-VAE is loaded where samples are first decoded."""
    assert job.recipe.vqvae is not None
    run, fingerprint = Storage(job.recipe.vqvae), facts.vqvae_fingerprint

    # Checked here and at the end: somebody may train that run anew while this one goes on.
    @functools.cache
    def vqvae(device: str) -> TrainedVQVAE:
        return open_autoencoder(run.uri, fingerprint=fingerprint).load(device)

    def check_copy(model: Storage) -> None:
        open_autoencoder((model / VQVAE_ASSET).uri, fingerprint=fingerprint).load()

    def images(latents: Tensor) -> Tensor:
        return vqvae(str(latents.device)).decode(latents / facts.scaling_factor)

    # As a run of its own, so that it is read back in the same way.
    made = diffusion_setup(job, facts, doing, images, {f"{VQVAE_ASSET}/model": run / "model"})
    return dataclasses.replace(made, check_assets=check_copy)
