#!/usr/bin/env python
"""Train a latent diffusion model: a conditional U-Net on the latents of a frozen VQ-VAE.

Paper: the report's VQ-VAE + latent diffusion; Rombach et al. 2022, https://arxiv.org/abs/2112.10752

    python jobs/train_ldm.py --variant best --storage URI --vqvae URI/runs/vqvae/NAME

Without --vqvae the VQ-VAE of the same variant (not of `report`) and name is trained first, into the same storage.

Hardware, time and score, all on one thread of a CPU beside other work (README, Results):

Variant shapes, on 16,000 scenes (jobs/prepare.py --num-train 16000): 89 minutes for 7,000 steps at commit 96025d9,
without its VQ-VAE; of the attributes that 500 test prompts name, 66.3 % are in the images.

Variant best has not been run to its end. Smaller, at 64² and with 8 epochs: 46 minutes at commit 96025d9; the named
colour wins in 41.1 % of 90 images, where chance is 33 %.

Variant report is meant for a GPU and has not been run.
"""

import dataclasses
import functools
import json
from typing import Any

from torch import Tensor

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
from jobs.runtime.features import cached_latent_column, ensure_dataset
from jobs.runtime.job import Job, parse_job
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import run_training
from jobs.train_vqvae import default_job
from jobs.train_vqvae import train as train_vqvae
from mmcore.data.columns import default_cache, open_column
from mmcore.data.prepared import TRAIN, read_captions
from mmcore.errors import InputError
from mmcore.generators.denoiser import DiffusionFacts
from mmcore.generators.diffusion_rows import scaling_factor
from mmcore.generators.latent_diffusion import VARIANTS, LatentDiffusionRecipe
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.recipe import difference, recipe_to_json
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_autoencoder
from mmcore.trained.generator import VQVAE_ASSET

# Images whose latents say by what all are scaled: a million numbers at the smallest size.
_SCALE_IMAGES = 1024


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


def vqvae_recipe(job: Job[LatentDiffusionRecipe]) -> VQVAERecipe:
    """The settings of the VQ-VAE that `job` names, or else of its own, which may be yet to be trained."""
    if job.recipe.vqvae is not None:
        return open_autoencoder(job.recipe.vqvae).recipe
    return vqvae_job(job).recipe


def describe_export(recipe: VQVAERecipe) -> None:
    """Say at the start what the VQ-VAE rules out at the end."""
    if recipe.num_heads > 1:
        print(
            f"the VQ-VAE has {recipe.num_heads} heads in its attention: what is trained on it cannot be exported, as "
            "diffusers' VQModel has one; train one with --num-heads 1 or 0 if it is to be",
            flush=True,
        )


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
    there = json.loads(own.run.read("recipe.json"))["settings"]
    differences = difference(recipe_to_json(own.recipe), there)
    if differences:
        raise InputError(
            f"{own.run} is finished with other settings: {'; '.join(differences[:5])}; name it with --vqvae if it is "
            "the one you mean, or give another --name"
        )
    print(f"no --vqvae given: taking the finished {own.run}", flush=True)
    return own.run


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


def train(job: Job[LatentDiffusionRecipe]) -> dict[str, Any]:
    """Make what is missing (Shapes, the VQ-VAE, latents, hidden states), then train. Returns the run's summary."""
    check(job)
    job = with_absolute_folders(job)
    storage = job.storage
    autoencoder = vqvae_recipe(job)
    x_0_shape = autoencoder.latent_shape
    describe_export(autoencoder)
    if job.options.dry_run:
        where = f"{vqvae_job(job).run} (trained first where missing)" if job.recipe.vqvae is None else job.recipe.vqvae
        dry_run(job, x_0_shape, f"{where}, {job.recipe.text.text_encoder}")
        return {}
    ensure_dataset(storage, job.recipe.dataset)
    table = read_captions(storage, job.recipe.dataset, job.recipe.split)
    num_train = len(table.rows(TRAIN))
    text = open_text(job.recipe, table)
    describe(job, text, x_0_shape, num_train)  # what cannot be is refused before anything is trained or encoded
    run = ensure_vqvae(job)
    recipe = dataclasses.replace(job.recipe, vqvae=run.uri)
    job = dataclasses.replace(job, recipe=recipe)
    vqvae = open_autoencoder(run.uri).load()
    columns = [
        cached_latent_column(
            storage, recipe.dataset, vqvae=run, flip=flip, stall_timeout_s=job.options.stall_timeout
        ).folder
        for flip in ([False, True] if recipe.flip else [False])
    ]
    some = [table.image_ids[row] for row in table.rows(TRAIN)[:_SCALE_IMAGES]]
    facts = DiffusionFacts(
        text_inputs(text),
        x_0_shape,
        vqvae.recipe.image_size,
        scaling_factor(open_column(columns[0], default_cache(), some).values),
        vqvae.fingerprint(),
        table.facts["fingerprint"],
        tuple(column.name for column in columns),
    )
    return run_training(job, setup, with_text(job, facts, table, text))


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or "", report_needs=" --vqvae URI"))


if __name__ == "__main__":
    run(main)
