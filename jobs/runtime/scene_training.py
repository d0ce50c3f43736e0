"""What the jobs on fresh scenes share: checks, and exhaustive captions. Scenes are rendered while a training runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from jobs.prepare import SHAPES
from jobs.runtime.generator_training import GeneratorFacts, read_tokenizer
from jobs.runtime.job import Job
from jobs.runtime.training_flow import say_steps
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.data.shapes import ShapesSettings, make_scene
from mmcore.data.shapes_captions import exhaustive_caption
from mmcore.errors import InputError
from mmcore.generators.fresh_scenes import FreshScenes, Output

# Scenes whose exhaustive captions tell how many are cut, and hold every word: a fifth of a second of drawing.
_TOLD_SCENES = 400


def check_scenes(recipe: Any) -> None:
    """Raise InputError for fresh scenes, or exhaustive captions, of what is not rendered."""
    if recipe.exhaustive_captions and not recipe.fresh_scenes:
        raise InputError(
            f"exhaustive_captions {recipe.exhaustive_captions} are made for fresh scenes alone; give --fresh-scenes, "
            "or --exhaustive-captions 0"
        )
    if recipe.fresh_scenes:
        mend = "give --no-fresh-scenes --exhaustive-captions 0"
        if recipe.dataset != SHAPES:
            raise InputError(f"fresh_scenes: --dataset {recipe.dataset} is not rendered, only {SHAPES} is; {mend}")
        if recipe.flip:
            raise InputError("flip: fresh scenes are never mirrored; give --no-flip, or --no-fresh-scenes")
        if not recipe.text.is_scratch:
            raise InputError(
                f"fresh_scenes: their captions are new, and the hidden states of --text-encoder "
                f"{recipe.text.text_encoder} are computed once; {mend}"
            )


def exhaustive_captions(job: Job[Any], table: CaptionTable) -> list[str]:
    """Those of the first scenes, of the epochs that follow where the data have fewer."""
    if not job.recipe.exhaustive_captions:
        return []
    settings = _shapes(table)
    return [
        exhaustive_caption(settings.seed, TRAIN, index, make_scene(settings.seed, TRAIN, index, settings.max_objects))
        for index in range(_TOLD_SCENES)
    ]


def _shapes(table: CaptionTable) -> ShapesSettings:
    """What the scenes of the data were drawn with; of data that a dry run only plans, its defaults."""
    return ShapesSettings(**table.facts.get("settings", {}))


def say_images(job: Job[Any], num_train: int) -> None:
    """Print the steps of the run, and how many images they are. Raises InputError for fewer rows than a batch."""
    recipe = job.recipe
    seen = "scenes are drawn while it trains, each seen once" if recipe.fresh_scenes else "are seen"
    print(f"images: {say_steps(job, num_train) * recipe.train.batch_size:,} {seen}", flush=True)


def encoded_split(recipe: Any, table: CaptionTable) -> str | None:
    """The split that is encoded, as ``COLUMN:NAME``; None for all. Fresh scenes stand for those that train."""
    return f"{recipe.split}:{table.validation_split}" if recipe.fresh_scenes else None


def num_encoded(job: Job[Any], table: CaptionTable) -> int:
    """How many images are encoded."""
    return len(table.validation_rows() if job.recipe.fresh_scenes else table.image_ids)


def without_train_captions(table: CaptionTable) -> CaptionTable:
    """Nobody asks for the captions of the scenes that fresh ones stand for."""
    captions = [[] if split == TRAIN else row for split, row in zip(table.splits, table.captions, strict=True)]
    return dataclasses.replace(table, captions=captions)


def fresh_scenes(
    job: Job[Any],
    facts: GeneratorFacts,
    table: CaptionTable,
    encode: Callable[[np.ndarray], Tensor],
    *,
    output: Output,
    image_size: int,
) -> FreshScenes:
    """The scenes of `job`, on a worker. `encode` makes `output` of images of `image_size`."""
    recipe = job.recipe
    return FreshScenes(
        _shapes(table),
        encode,
        read_tokenizer(job, facts),
        output=output,
        image_size=image_size,
        captions_per_image=recipe.captions_per_image,
        exhaustive_captions=recipe.exhaustive_captions,
    )
