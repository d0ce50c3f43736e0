"""The way of every training job: refuse, dry run, dataset, table, sizes, frozen features, training."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.data import Dataset
from torch import nn

from jobs.prepare import SHAPES, PrepareSettings, prepare
from jobs.runtime.commandline import counted, say_next
from jobs.runtime.job import Job, R
from jobs.runtime.next_command import after_training
from jobs.runtime.run_folder import check_begun, check_new_run
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary, run_training
from mmcore.catalogue import RECIPES
from mmcore.data.columns import SUCCESS, TensorSpec, bytes_per_image, default_cache
from mmcore.data.prepared import TRAIN, CaptionTable, read_captions, shapes_table
from mmcore.data.shapes import ShapesSettings
from mmcore.errors import InputError
from mmcore.recipe import recipe_to_json
from mmcore.training_plan import num_steps

F = TypeVar("F")
# Of the lines in which a dry run lists the settings.
_WIDTH = 110
# Every documented result took a thousand steps or more.
_FEW_STEPS = 300


@dataclass(frozen=True)
class Encoded(Generic[R, F]):
    """A job whose frozen features are there."""

    job: Job[R]
    """With the runs and folders that were found or made."""
    facts: F
    datasets: dict[str, Dataset] | None = None
    """Ray Datasets that a streamed run splits over its workers."""


@dataclass(frozen=True)
class Flow(Generic[R, F]):
    """What a kind of recipe does at each place of the way."""

    check: Callable[[Job[R]], Job[R]]
    """Raises InputError for what can be refused without any data; returns the job with absolute folders."""
    plan: Callable[[Job[R], CaptionTable], F]
    """The facts that decide the sizes of the model, before anything is encoded or written."""
    describe: Callable[[Job[R], F, int], None]
    """Prints sizes and steps for a number of training rows. Raises InputError for what does not fit."""
    encode: Callable[[Job[R], CaptionTable, F], Encoded[R, F]]
    """Makes what is missing: the cached features, and models that the recipe builds on."""
    columns: Callable[[Job[R], F], dict[str, TensorSpec]]
    """The tensors that are cached of an image, by what they are, for a dry run."""
    setup: Callable[[Job[R], F, Doing], Setup]
    """Model and rows, on a worker."""
    cached: Callable[[Job[R], CaptionTable], int] = lambda job, table: len(table.image_ids)
    """How many images they are cached of, for a dry run."""
    reads: Callable[[Job[R]], str] = lambda job: ""
    """What a training reads beside its data and features, for a dry run."""
    writes: str = "tokenizers"
    """Folder of the storage that a training writes beside its run, for a dry run."""


def train_by(flow: Flow[R, F], job: Job[R]) -> RunSummary:
    """Make what is missing, then train; name the next command. Returns the run's summary, of a dry run nothing.

    Raises InputError before anything is written for a run, settings or data that cannot be.
    """
    check_new_run(job)
    job = flow.check(job)
    _check_flip(job.recipe)
    if job.options.dry_run:
        _dry_run(flow, job)
        return {}
    ensure_dataset(job)
    table = read_captions(job.storage, job.recipe.dataset, job.recipe.split)
    facts = flow.plan(job, table)
    check_begun(job, facts)
    flow.describe(job, facts, len(table.rows(TRAIN)))
    encoded = flow.encode(job, table, facts)
    summary = run_training(encoded.job, flow.setup, encoded.facts, encoded.datasets)
    if job.is_typed:
        say_next(after_training(encoded.job, table))
    return summary


def _check_flip(recipe: Any) -> None:
    """Refuse mirrored scenes under captions that say what is on the left; a VQ-VAE reads no captions."""
    if hasattr(recipe, "captions_per_image") and recipe.flip and recipe.dataset == SHAPES:
        raise InputError(f"flip: the captions of --dataset {SHAPES} say left and right; give --no-flip")


def ensure_dataset(job: Job[Any]) -> None:
    """Make the built-in data where they are wanted and missing. Any will do, as somebody may have made more."""
    if _lacks_shapes(job):
        prepare(PrepareSettings(dataset=SHAPES, storage=job.storage.uri))


def _lacks_shapes(job: Job[Any]) -> bool:
    return job.recipe.dataset == SHAPES and not (job.storage / "data" / SHAPES).exists(SUCCESS)


def train_captions(table: CaptionTable, captions_per_image: int) -> list[str]:
    """The captions that are trained on."""
    return [caption for row in table.rows(TRAIN) for caption in table.captions[row][:captions_per_image]]


def parameters(module: nn.Module | None) -> int:
    """How many `module` has, frozen ones too."""
    return sum(parameter.numel() for parameter in module.parameters()) if module else 0


def in_millions(count: int) -> str:
    """``2.71 M``; of a part so small that this would tell nothing, the number itself."""
    return f"{count / 1e6:.2f} M" if count >= 10_000 else f"{count:,}"


def with_mirrored(columns: dict[str, TensorSpec], flip: bool) -> dict[str, TensorSpec]:
    """The tensors of an image and, with `flip`, as many of the mirrored image."""
    return columns | ({f"mirrored_{name}": spec for name, spec in columns.items()} if flip else {})


def say_sizes(job: Job[Any], parts: Mapping[str, int]) -> None:
    """Print the number of parameters of each part by its name; what has none is left out."""
    told = ", ".join(f"{in_millions(count)} of {part}" for part, count in parts.items() if count)
    print(f"parameters of {job.recipe_name}: {told}", flush=True)


def say_steps(job: Job[Any], num_train: int) -> int:
    """Print the steps of the run, and what to raise where the epochs give few. Returns the number of steps.

    Raises InputError for fewer training rows than a batch.
    """
    train = job.recipe.train
    steps_per_epoch, total = num_steps(train, num_train)
    print(f"steps: {total:,}, each of {train.batch_size} images; an epoch has {steps_per_epoch:,}", flush=True)
    allowed = steps_per_epoch * train.num_epochs
    # The own number of a variant is for its own data.
    usual = RECIPES[job.recipe_name].variants[job.variant].train.max_steps
    if train.max_steps not in (None, usual) and train.max_steps > allowed:
        told = f"--max-steps {train.max_steps:,} is not reached"
    elif total == allowed < _FEW_STEPS and job.variant != "smoke":
        told = "a model of this kind takes some thousand steps"
    else:
        return total
    epochs = f"the {train.num_epochs:,} epochs have" if train.num_epochs > 1 else "the one epoch has"
    print(f"note: {epochs} only {counted(allowed, 'step')}; {told}: raise --num-epochs", flush=True)
    return total


def say_what_is_cut(job: Job[Any], lengths: Sequence[int], most_of: Callable[[Any], int], mend: str) -> None:
    """Print how many captions have more tokens than the recipe takes, and what helps. Begin and end count too.

    Args:
        lengths: tokens of each caption.
        most_of: a recipe's most tokens of a caption.
    """
    most = most_of(job.recipe)
    # Nobody chose the number of a smoke test, which is over after 20 steps.
    if job.variant == "smoke" and most == most_of(RECIPES[job.recipe_name].variants[job.variant]):
        return
    if num_cut := sum(length > most for length in lengths):
        print(
            f"captions: {num_cut:,} of {len(lengths):,} have more than {most} tokens, with begin and end, and lose "
            f"their tail; {mend}",
            flush=True,
        )


def _dry_run(flow: Flow[R, F], job: Job[R]) -> None:
    """Print what would be read and written, sizes and steps, and last the resolved recipe; nothing is written."""
    recipe, storage = job.recipe, job.storage
    makes_shapes, shapes = _lacks_shapes(job), ShapesSettings()
    table = shapes_table(shapes) if makes_shapes else read_captions(storage, recipe.dataset, recipe.split)
    facts = flow.plan(job, table)
    print(f"recipe: {job.recipe_name}, variant {job.variant}")
    if makes_shapes:
        print(f"first:  makes the Shapes data, {', '.join(f'{name} {value}' for name, value in vars(shapes).items())}")
    reads = [f"{storage}/data/{recipe.dataset}", flow.reads(job), f"{storage}/features (encoded first where missing)"]
    writes = [str(job.run), flow.writes and f"{storage}/{flow.writes}", f"copies of the features in {default_cache()}"]
    print(f"reads:  {', '.join(filter(None, reads))}")
    print(f"writes: {', '.join(filter(None, writes))}")
    specs = flow.columns(job, facts)
    num_cached = flow.cached(job, table)
    size = bytes_per_image({"tensors": {name: dataclasses.asdict(spec) for name, spec in specs.items()}})
    print(
        f"state:  {size:,} bytes an image ({' and '.join(specs)}), {size * num_cached / 1e6:,.1f} MB for "
        f"{num_cached:,} images, in the storage and on each machine"
    )
    flow.describe(job, facts, len(table.rows(TRAIN)))
    settings = ", ".join(f"{name} {value}" for name, value in _flat(recipe_to_json(recipe)))
    print(textwrap.fill(f"settings: {settings}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False))


def _flat(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a recipe and of its parts, by names of their own as in the flags."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value
