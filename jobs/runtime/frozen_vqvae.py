"""The frozen VQ-VAE that a generator is trained on: named by the job, or trained first; on a worker always that one."""

import dataclasses
import shlex
from typing import Any

from jobs.runtime.autoencoder_training import default_job, train_autoencoder
from jobs.runtime.job import Job
from mmcore.errors import InputError
from mmcore.generators.facts import VQVAEFacts
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.recipe import difference, recipe_to_json
from mmcore.run_files import VQVAE_ASSET, read_begun
from mmcore.storage import Storage
from mmcore.trained.autoencoder import TrainedVQVAE, open_vqvae

# Recipe and variant whose VQ-VAE is of another variant: a Transformer guesses codes, which not all are made for.
_OTHER_VARIANTS = {("autoregressive", "shapes"): "shapes-codes"}

# -- on the driver; the job's recipe has a field `vqvae` -----------------------------------------------------------


def vqvae_job(job: Job[Any]) -> Job[VQVAERecipe]:
    """The training of the VQ-VAE that belongs to `job` where it names none: same variant, name, data and machines.

    One of another variant has another name, so that jobs of one name share what they can and nothing else. Raises
    InputError for a variant whose VQ-VAE needs weights that this job does not ask for.
    """
    variant = _OTHER_VARIANTS.get((job.recipe_name, job.variant), job.variant)
    name = job.options.name if variant == job.variant else f"{job.options.name}-{variant}"
    own = default_job("vqvae", job.storage, name, variant, job.options)
    if own.recipe.perceptual is not None:
        raise InputError(
            f"--vqvae is missing: the VQ-VAE of `{variant}` is trained with a perceptual loss whose weights are "
            f"files of yours; run `python jobs/train_vqvae.py --variant {variant} --vgg16 FILE --lpips-heads FILE "
            f"--storage {shlex.quote(str(job.storage))}` first, and name its run"
        )
    recipe = dataclasses.replace(own.recipe, dataset=job.recipe.dataset, split=job.recipe.split)
    return dataclasses.replace(own, recipe=recipe)


def vqvae_recipe(job: Job[Any]) -> VQVAERecipe:
    """The settings of the VQ-VAE that `job` names, or else of its own, which may be yet to be trained.

    Raises InputError for a name of something else than a trained VQ-VAE.
    """
    if job.recipe.vqvae is None:
        return vqvae_job(job).recipe
    try:
        return open_vqvae(job.recipe.vqvae).recipe
    except InputError as error:
        if (Storage(job.recipe.vqvae) / "model").exists("recipe.json"):
            raise
        raise InputError(f"--vqvae {error}; jobs/train_vqvae.py trains a VQ-VAE") from None


def say_vqvae(job: Job[Any]) -> None:
    """Where `job` names none, print which is taken or trained first, and finished ones of the same settings."""
    if job.recipe.vqvae is not None:
        return
    own = vqvae_job(job)
    if own.run.exists("_SUCCESS"):
        print(f"no --vqvae given: taking the finished {own.run}, which goes by --name", flush=True)
        return
    others = [run.uri for run in map(own.run.parent.__truediv__, own.run.parent.folders()) if _is_like(run, own)]
    known = f"; finished with the same settings: {', '.join(others)} (give it as --vqvae)" if others else ""
    print(f"no --vqvae given: {own.run} is trained first, under the name of --name{known}", flush=True)


def _is_like(run: Storage, own: Job[VQVAERecipe]) -> bool:
    """Whether `run` is finished and what `own` would become."""
    if not run.exists("_SUCCESS"):
        return False
    try:
        there = read_begun(run, VQVAERecipe, VQVAEFacts).recipe
    except InputError:  # of settings that are no more, so it is another
        return False
    return not difference(recipe_to_json(own.recipe), recipe_to_json(there))


def reads_vqvae(job: Job[Any]) -> str:
    """What is read of it, for a dry run."""
    return job.recipe.vqvae or f"{vqvae_job(job).run} (trained first where missing)"


def ensure_vqvae(job: Job[Any]) -> Storage:
    """The run of the VQ-VAE: the one that `job` names, or else its own, trained now unless it is finished.

    Raises InputError where its own is finished with other settings.
    """
    if job.recipe.vqvae is not None:
        return Storage(job.recipe.vqvae)
    own = vqvae_job(job)
    if not own.run.exists("_SUCCESS"):
        print(f"training the VQ-VAE {own.run} first", flush=True)
        try:
            train_autoencoder(own)
        except InputError as error:
            if "--" not in str(error):
                raise
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
    return own.run


# -- on a worker ---------------------------------------------------------------------------------------------------


class FrozenVQVAE:
    """The VQ-VAE, loaded at its first use.

    Its fingerprint is checked then, and that of the run's copy at the end. The VQ-VAE may be trained again while a
    generator trains on its outputs.
    """

    def __init__(self, run: str, fingerprint: str) -> None:
        self.run, self.fingerprint = Storage(run), fingerprint
        self.loaded: dict[str, TrainedVQVAE] = {}

    def on(self, device: str) -> TrainedVQVAE:
        """Raises InputError where it is another than it was."""
        if device not in self.loaded:
            self.loaded[device] = open_vqvae(self.run.uri, fingerprint=self.fingerprint).load(device)
        return self.loaded[device]

    @property
    def assets(self) -> dict[str, Storage]:
        """What a run copies of it: as a run of its own, so that it is read back in the same way."""
        return {f"{VQVAE_ASSET}/model": self.run / "model"}

    def check_copy(self, model: Storage) -> None:
        """Raise InputError where the copy in the folder `model` is another."""
        open_vqvae((model / VQVAE_ASSET).uri, fingerprint=self.fingerprint).load()
