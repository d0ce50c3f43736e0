"""The frozen autoencoder that a generator is trained on.

The job names its run, or it is trained first. On a worker it is always that one.
"""

import dataclasses
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jobs.runtime.autoencoder_training import default_job, train_autoencoder
from jobs.runtime.encoders import AutoencoderOutput
from jobs.runtime.features import cached_autoencoder_column
from jobs.runtime.job import Job
from jobs.runtime.run_folder import check_begun
from jobs.runtime.training_flow import Encoded
from mmcore.catalogue import RECIPES
from mmcore.errors import InputError
from mmcore.generators.facts import AutoregressiveFacts, DiffusionFacts, InfinityFacts
from mmcore.generators.infinity_tokenizer import InfinityTokenizerRecipe
from mmcore.generators.vqvae import VQVAERecipe
from mmcore.recipe import difference, recipe_to_json
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET, VQVAE_ASSET, read_begun
from mmcore.storage import Storage
from mmcore.trained.autoencoder import (
    TrainedAutoencoder,
    TrainedInfinityTokenizer,
    TrainedVQVAE,
    open_tokenizer,
    open_vqvae,
)

R = TypeVar("R", VQVAERecipe, InfinityTokenizerRecipe)
T = TypeVar("T", bound=TrainedAutoencoder)
F = TypeVar("F", DiffusionFacts, AutoregressiveFacts, InfinityFacts)


@dataclass(frozen=True)
class FrozenKind(Generic[R, T]):
    """A kind of autoencoder that generators are trained on. The recipe of such a job has a field for its run."""

    recipe_name: str
    """The recipe of the autoencoder."""
    what: str
    """What messages call it."""
    recipe_field: str
    """The field of the generator's recipe that names its run."""
    command: str
    """The job that trains it."""
    open: Callable[..., T]
    """Opens its finished run."""
    asset: str
    """Folder of its copy under the model of a generator."""
    other_variants: dict[tuple[str, str], str] = field(default_factory=dict)
    """Recipe and variant of a generator whose autoencoder is of another variant."""

    # -- on the driver ---------------------------------------------------------------------------------------------

    @property
    def flag(self) -> str:
        return "--" + self.recipe_field.replace("_", "-")

    def named(self, job: Job[Any]) -> str | None:
        """The run that `job` names."""
        return getattr(job.recipe, self.recipe_field)

    def own_job(self, job: Job[Any]) -> Job[R]:
        """The training of the autoencoder that belongs to `job` where it names none.

        It has the same variant, name, data and machines. One of another variant has another name, so that jobs of one
        name share what they can and nothing else.
        Raises InputError for a variant whose autoencoder needs weights that this job does not ask for.
        """
        variant = self.other_variants.get((job.recipe_name, job.variant), job.variant)
        name = job.options.name if variant == job.variant else f"{job.options.name}-{variant}"
        own = default_job(self.recipe_name, job.storage, name, variant, job.options)
        if own.recipe.perceptual is not None:
            raise InputError(
                f"{self.flag} is missing: the {self.what} of `{variant}` is trained with a perceptual loss whose "
                f"weights are files of yours; run `python {self.command} --variant {variant} --vgg16 FILE "
                f"--lpips-heads FILE --storage {shlex.quote(str(job.storage))}` first, and name its run"
            )
        recipe = dataclasses.replace(own.recipe, dataset=job.recipe.dataset, split=job.recipe.split)
        return dataclasses.replace(own, recipe=recipe)

    def recipe(self, job: Job[Any]) -> R:
        """The settings of the autoencoder that `job` names, or else of its own, which may be yet to be trained.

        Raises InputError for a name of something else than such a finished run.
        """
        named = self.named(job)
        if named is None:
            return self.own_job(job).recipe
        try:
            opened: Any = self.open(named)
        except InputError as error:
            if (Storage(named) / "model").exists("recipe.json"):
                raise
            raise InputError(f"{self.flag} {error}; {self.command} trains a {self.what}") from None
        return opened.recipe

    def say(self, job: Job[Any]) -> None:
        """Where `job` names none, print which is taken or trained first, and finished ones of the same settings."""
        if self.named(job) is not None:
            return
        own = self.own_job(job)
        none = f"no {self.flag} given:"
        if own.run.exists("_SUCCESS"):
            print(f"{none} taking the finished {own.run}, which goes by --name", flush=True)
            return
        runs = map(own.run.parent.__truediv__, own.run.parent.folders())
        others = [run.uri for run in runs if self._is_like(run, own)]
        known = f"; finished with the same settings: {', '.join(others)} (give it as {self.flag})" if others else ""
        print(f"{none} {own.run} is trained first, under the name of --name{known}", flush=True)

    def _difference(self, run: Storage, own: Job[R]) -> list[str]:
        """In what the settings of `own` differ from those that `run` was begun with."""
        entry = RECIPES[self.recipe_name]
        # A field that is younger than the run has its default, which is how the run was trained.
        there = read_begun(run, entry.recipe_type, entry.facts_type).recipe
        return difference(recipe_to_json(own.recipe), recipe_to_json(there))

    def _is_like(self, run: Storage, own: Job[R]) -> bool:
        """Whether `run` is finished and what `own` would become."""
        if not run.exists("_SUCCESS"):
            return False
        try:
            return not self._difference(run, own)
        except InputError:  # of settings that are no more, so it is another
            return False

    def reads(self, job: Job[Any]) -> str:
        """What is read of it, for a dry run."""
        return self.named(job) or f"{self.own_job(job).run} (trained first where missing)"

    def ensure(self, job: Job[Any]) -> Storage:
        """The run of the autoencoder: the one that `job` names, or else its own, trained now unless it is finished.

        Raises InputError where its own is finished with other settings.
        """
        named = self.named(job)
        if named is not None:
            return Storage(named)
        own = self.own_job(job)
        if not own.run.exists("_SUCCESS"):
            print(f"training the {self.what} {own.run} first", flush=True)
            try:
                train_autoencoder(own)
            except InputError as error:
                if "--" not in str(error):
                    raise
                # The flags that would mend it are those of the other job.
                mend = f"train it with {self.command}, then name it with {self.flag}"
                raise InputError(f"the {self.what} {own.run}: {error} ({mend})") from error
            return own.run
        if differences := self._difference(own.run, own):
            raise InputError(
                f"{own.run} is finished with other settings: {'; '.join(differences[:5])}; name it with {self.flag} if "
                "it is the one you mean, or give another --name"
            )
        return own.run

    def encode(
        self,
        job: Job[Any],
        facts: F,
        *,
        output: AutoencoderOutput,
        split: str | None = None,
        fact: str = "autoencoder_fingerprint",
    ) -> Encoded[Any, F]:
        """Encode the images of `job` by its autoencoder, each view to a column, and note both in job and facts.

        Args:
            split: ``COLUMN:NAME`` takes the images of one split alone.
            fact: the field of the facts for the autoencoder's fingerprint.
        Raises InputError as `ensure`, and where the run of `job` was begun with other facts.
        """
        run = self.ensure(job)
        fingerprint = self.open(run.uri).load().fingerprint()
        of_run: dict[str, Any] = {fact: fingerprint}
        facts = dataclasses.replace(facts, **of_run)
        check_begun(job, facts)
        recipe = dataclasses.replace(job.recipe, **{self.recipe_field: run.uri})
        columns = [
            cached_autoencoder_column(
                job.storage,
                recipe.dataset,
                output=output,
                run=run,
                fingerprint=fingerprint,
                flip=flip,
                num_views=1 + recipe.flip,
                split=split,
                stall_timeout_s=job.options.stall_timeout,
            )
            for flip in ([False, True] if recipe.flip else [False])
        ]
        facts = dataclasses.replace(facts, columns=tuple(column.folder.name for column in columns))
        return Encoded(dataclasses.replace(job, recipe=recipe), facts)

    # -- on a worker -----------------------------------------------------------------------------------------------

    def frozen(self, run: str, fingerprint: str) -> "FrozenAutoencoder[T]":
        return FrozenAutoencoder(self.open, self.asset, Storage(run), fingerprint)


class FrozenAutoencoder(Generic[T]):
    """The autoencoder, loaded at its first use.

    Its fingerprint is checked then, and that of the run's copy at the end. The autoencoder may be trained again while a
    generator trains on its outputs.
    """

    def __init__(self, open_run: Callable[..., T], asset: str, run: Storage, fingerprint: str) -> None:
        self.open_run, self.asset, self.run, self.fingerprint = open_run, asset, run, fingerprint
        self.loaded: dict[str, T] = {}

    def on(self, device: str) -> T:
        """Raises InputError where it is another than it was."""
        if device not in self.loaded:
            self.loaded[device] = self.open_run(self.run.uri, fingerprint=self.fingerprint).load(device)
        return self.loaded[device]

    @property
    def assets(self) -> dict[str, Storage]:
        """What a run copies of it: as a run of its own, so that it is read back in the same way."""
        return {f"{self.asset}/model": self.run / "model"}

    def check_copy(self, model: Storage) -> None:
        """Raise InputError where the copy in the folder `model` is another."""
        self.open_run((model / self.asset).uri, fingerprint=self.fingerprint).load()


VQVAE: FrozenKind[VQVAERecipe, TrainedVQVAE] = FrozenKind(
    "vqvae",
    "VQ-VAE",
    "vqvae",
    "jobs/train_vqvae.py",
    open_vqvae,
    VQVAE_ASSET,
    # A Transformer guesses codes, which not all are made for.
    {("autoregressive", "shapes"): "shapes-codes"},
)
TOKENIZER: FrozenKind[InfinityTokenizerRecipe, TrainedInfinityTokenizer] = FrozenKind(
    "infinity_tokenizer",
    "tokenizer",
    "image_tokenizer",
    "jobs/train_infinity.py --stage tokenizer",
    open_tokenizer,
    TOKENIZER_OF_BITS_ASSET,
)
