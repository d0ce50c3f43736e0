"""The command that usually follows a job: a program of `jobs/` and its flags, for `commandline.say_next`.

A folder for results is a new one where the usual one is taken, so that the command works as it is.
"""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.prepare import SHAPES, own_split
from jobs.runtime.job import Job
from jobs.runtime.scores_place import scores_place
from jobs.runtime.sweep import SWEEP
from mmcore.captioners.cross_attention import VARIANTS, CrossAttentionCaptionerRecipe
from mmcore.catalogue import RECIPES
from mmcore.data.columns import SUCCESS
from mmcore.data.prepared import TEST, TRAIN, VALIDATION, CaptionTable
from mmcore.data.prompts import FLICKR8K_TEST, SHAPES_TEST
from mmcore.recipe import Recipe
from mmcore.storage import Storage

# That of the published captioner; the default of `best` is the report's.
_ENCODER = "google/mobilenet_v2_1.0_224"
# How the captioner `best` is scored in docs/results.md.
_SEARCH_OF_PHOTOS = ["--num-beams", "5", "--length-penalty", "0.6"]
# For a first look at the generator of photographs; the whole split takes long without a GPU.
_NUM_PHOTOS = 100
_PREPARED = re.compile(r"(?P<storage>.+)/data/(?P<dataset>[^/]+)")


def after_preparing(dataset: str, storage: str, splits: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The captioner that trains on the dataset. Its run has the dataset's name.

    `splits`: column to counts of its values, as `prepare` returns them. A dataset with a split of its own is trained by
    that, Flickr8k by the report's. Nothing follows where no image would train, or none validate.
    """
    if dataset == SHAPES:
        variant, split, flags = SHAPES, "split", []
    else:
        variant = "best"
        split = own_split(dataset, splits) or VARIANTS[variant].split
        flags = ["--encoder", _ENCODER, "--dataset", dataset]
        # Without the flag the variant takes the report's.
        flags += ["--split", split] if split != VARIANTS[variant].split else []
    if TRAIN not in splits[split] or {VALIDATION, TEST}.isdisjoint(splits[split]):
        return []
    flags += _batch_size(VARIANTS[variant], splits[split][TRAIN])
    name = ["--name", dataset] if dataset != SHAPES else []
    return ["train_resnet_captioner.py", "--variant", variant, *flags, "--storage", storage, *name]


def after_training(job: Job[Any], table: CaptionTable) -> list[str]:
    """What uses the finished run of `job`, which trained on `table`; nothing where no prompts are at hand."""
    split = f"{job.recipe.split}:{TEST if TEST in table.splits else table.validation_split}"
    run, storage, dataset = _place(job.run), _place(job.storage), job.recipe.dataset
    kind = RECIPES[job.recipe_name].kind
    if kind == "captioner":
        is_published = isinstance(job.recipe, CrossAttentionCaptionerRecipe) and job.variant == "best"
        search = _SEARCH_OF_PHOTOS if is_published and dataset != SHAPES else []
        images, out = _place(job.storage / "data" / dataset), _new(job, "captions", SWEEP)
        return ["caption.py", "--run", run, "--images", images, "--split", split, *search, "--out", _place(out)]
    if kind == "retriever":
        of_split = ["--storage", storage, "--dataset", dataset, "--split", split]
        return ["evaluate.py", "retrieval", "--run", run, *of_split]
    if kind == "autoencoder":
        return _generator_on(job, len(table.rows(TRAIN)))
    if dataset == SHAPES:
        # Without test images in the storage, the same scenes are made.
        prompts = [SHAPES_TEST, *(["--storage", storage] if TEST in table.splits else [])]
    elif split == "split_report_generation:test" and dataset == "flickr8k":
        prompts = [FLICKR8K_TEST, "--storage", storage, "--count", str(min(_NUM_PHOTOS, len(table.rows(TEST))))]
    else:
        return []
    return ["generate.py", "--run", run, "--prompts", *prompts, "--out", _place(_new(job, "sweeps", SWEEP))]


def after_captioning(run: str, images: str, split: str | None, out: str, num_skipped: int) -> list[str]:
    """The scores of the captions in `out`; nothing for images that are no prepared dataset."""
    prepared = _PREPARED.fullmatch(Storage(images).uri)
    if prepared is None or not Storage(images).exists(SUCCESS):
        return []
    # The predictions must be for exactly the images of a split.
    of_split = ["--split", split] if split is not None and not num_skipped else []
    predictions = _place(Storage(out) / "captions.csv")
    storage = ["--storage", _place(Storage(prepared["storage"])), "--dataset", prepared["dataset"]]
    return ["evaluate.py", "captions", "--predictions", predictions, *storage, *of_split, *_of_run(run)]


def after_generating(run: str, prompts: str, out: str) -> list[str]:
    """The scores of the images in `out`; nothing for prompts that no oracle reads."""
    return ["evaluate.py", "shapes", "--sweep", _place(Storage(out)), *_of_run(run)] if prompts == SHAPES_TEST else []


def _generator_on(job: Job[Any], num_train: int) -> list[str]:
    """The generator that is trained on the autoencoder of `job`."""
    name, flag = ("autoregressive" if job.recipe.encoder == "patches" else "ldm"), "--vqvae"
    if job.recipe_name == "infinity_tokenizer":
        name, flag = "infinity", "--image-tokenizer"
    variants = RECIPES[name].variants
    # `shapes-codes` is the VQ-VAE of the Transformer's `shapes`.
    variant = job.variant.removesuffix("-codes")
    variant = variant if variant in variants else "best"
    flags = ["--variant", variant, flag, _place(job.run), "--storage", _place(job.storage)]
    for field in ("dataset", "split"):
        if (value := getattr(job.recipe, field)) != getattr(variants[variant], field):
            flags += [f"--{field}", value]
    if job.recipe.dataset != SHAPES and getattr(variants[variant], "fresh_scenes", False):
        flags += ["--no-fresh-scenes", "--exhaustive-captions", "0"]
    flags += _batch_size(variants[variant], num_train)
    run = _new(job, "runs", "recipe.json", name)
    return [f"train_{name}.py", *flags, *(["--name", run.name] if run.name != "default" else [])]


def _batch_size(recipe: Recipe, num_train: int) -> list[str]:
    """A batch is no larger than the images that train."""
    return ["--batch-size", str(num_train)] if num_train < recipe.train.batch_size else []


def _new(job: Job[Any], kind: str, begun: str, recipe_name: str | None = None) -> Storage:
    """STORAGE/KIND/RECIPE/NAME, with a number behind it where the file `begun` says that it is taken."""
    names = itertools.chain([job.options.name], (f"{job.options.name}-{number}" for number in itertools.count(2)))
    folders = (job.storage / kind / (recipe_name or job.recipe_name) / name for name in names)
    return next(folder for folder in folders if not folder.exists(begun))


def _of_run(run: str) -> list[str]:
    """`--run`, unless the run has scores already: those of other captions or images are never replaced."""
    place = scores_place(Storage(run.rstrip("/")))
    return [] if place is None or place[0].exists(place[1]) else ["--run", _place(Storage(run))]


def _place(folder: Storage) -> str:
    """As short as it can be named from here."""
    if not folder.is_s3 and Path(folder.uri).is_relative_to(Path.cwd()):
        return str(Path(folder.uri).relative_to(Path.cwd()))
    return folder.uri
