#!/usr/bin/env python
"""Train a captioner: a frozen image encoder, cross-attention, a Transformer decoder over words.

Paper: row 1 of the report's Table 1 (ResNet-18); decoder of Vaswani et al. 2017, https://arxiv.org/abs/1706.03762

    python jobs/train_resnet_captioner.py --variant best --storage URI --encoder NAME_OR_FOLDER

Hardware: any. `shapes` takes 10 minutes on two CPU cores; `best` on Flickr8k 40, of which the encoder half, once.
"""

import json
from typing import Any

import numpy as np
import ray.train
import torch

from jobs.prepare import SHAPES
from jobs.runtime.cluster import connect
from jobs.runtime.commandline import run
from jobs.runtime.features import StreamedCaptionRows, cached_image_column, ensure_dataset, streamed_column
from jobs.runtime.job import Job, parse_job
from jobs.runtime.run_folder import check_new_run
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import run_training
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.cross_attention import (
    VARIANTS,
    CaptionerFacts,
    CrossAttentionCaptioner,
    CrossAttentionCaptionerRecipe,
)
from mmcore.data.columns import default_cache, open_column
from mmcore.data.prepared import CaptionTable, read_captions, shapes_table
from mmcore.data.shapes import ShapesSettings
from mmcore.errors import InputError
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.recipe import recipe_to_json
from mmcore.seeding import derive_seed
from mmcore.text import WordVocabulary
from mmcore.training import num_steps

# Table 1, row 1: total and trainable parameters in millions.
TABLE_1 = (34.2, 21.5)


def build_vocabulary(recipe: CrossAttentionCaptionerRecipe, table: CaptionTable) -> WordVocabulary:
    """The words of the recipe's source captions."""
    if recipe.vocabulary_source == "first_captions":
        captions = [captions[0] for captions in table.captions]
    else:
        captions = [text for row in table.rows("train") for text in table.captions[row][: recipe.captions_per_image]]
    return WordVocabulary.build(captions, min_count=recipe.min_word_count, lowercase=recipe.lowercase)


def setup(job: Job[CrossAttentionCaptionerRecipe], facts: CaptionerFacts, doing: Doing) -> Setup:
    """Model and rows, on a worker."""
    recipe = job.recipe
    vocabulary = WordVocabulary.from_json(facts.vocabulary)
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    folders = [job.storage / "features" / key for key in facts.columns]
    keywords = {
        "captions_per_image": recipe.captions_per_image,
        "max_length": recipe.max_length,
        "seed": recipe.train.seed,
    }
    rows: CaptionRows
    if job.options.stream:
        only = [table.image_ids[row] for row in table.rows("validation")]
        views = [open_column(folder, default_cache(), only, doing) for folder in folders]
        shard = ray.train.get_dataset_shard("train")
        shape, dtype = views[0].values.shape[1:], str(views[0].values.dtype)
        rows = StreamedCaptionRows(table, views, vocabulary, shard=shard, shape=shape, dtype=dtype, **keywords)
    else:
        views = [open_column(folder, default_cache(), doing=doing) for folder in folders]
        rows = CaptionRows(table, views, vocabulary, **keywords)
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)

    def samples(model: torch.nn.Module, step: int) -> dict[str, Any]:
        assert isinstance(model, CrossAttentionCaptioner)
        chosen = rows.validation[: recipe.train.num_samples]
        parameter = next(model.parameters())
        images = rows.images(chosen, None).to(parameter.device)
        images = images.to(parameter.dtype) if images.is_floating_point() else images
        return dict(zip([rows.image_ids[row] for row in chosen], model.caption(images), strict=True))

    return Setup(model, rows, samples)


def describe(
    job: Job[CrossAttentionCaptionerRecipe], vocabulary: WordVocabulary, encoder_shape: tuple[int, int], num_train: int
) -> None:
    """Print sizes beside the report's Table 1, and the steps."""
    recipe = job.recipe
    model = recipe.build(CaptionerFacts(vocabulary.to_json(), *encoder_shape))
    trainable = sum(parameter.numel() for parameter in model.parameters())
    frozen = 0
    if recipe.encoder != SCRATCH:
        encoder = FrozenVisionEncoder(recipe.encoder, recipe.image_size).model
        frozen = sum(parameter.numel() for parameter in encoder.parameters())
    steps_per_epoch, total = num_steps(recipe.train, num_train)
    print(
        f"parameters: {(trainable + frozen) / 1e6:.2f} M in all, {trainable / 1e6:.2f} M trainable "
        f"(Table 1: {TABLE_1[0]} M and {TABLE_1[1]} M); vocabulary {len(vocabulary):,} words\n"
        f"steps: {total:,} of {recipe.train.batch_size} images, {steps_per_epoch:,} an epoch",
        flush=True,
    )
    if job.variant == "report":
        words = 2 * len(vocabulary) * recipe.width / 1e6
        print(
            "Table 1's 21.5 M does not follow from the published settings: six layers of width 512 with FFN 2048 have "
            "25.2 M weights (FFN 1024 would give 21.6 M), the vectors and the output layer of the "
            f"{len(vocabulary):,} words that the first captions hold twice or more {words:.1f} M, the image projection "
            f"the rest. The settings win here. The total adds the frozen encoder, {frozen / 1e6:.1f} M now; Table 1's "
            "leaves 12.7 M for ResNet-18, whose convolutions have 11.2 M.",
            flush=True,
        )


def dry_run(job: Job[CrossAttentionCaptionerRecipe]) -> None:
    """Print the resolved recipe and what would be read and written; nothing is written."""
    recipe, storage = job.recipe, job.storage
    makes_shapes = recipe.dataset == SHAPES and not (storage / "data" / SHAPES).exists("_SUCCESS")
    # What is missing is said before fifty lines of settings.
    table = shapes_table(ShapesSettings()) if makes_shapes else read_captions(storage, recipe.dataset, recipe.split)
    encoder_shape = (0, 0)
    if recipe.encoder != SCRATCH:
        num_tokens, width = FrozenVisionEncoder(recipe.encoder, recipe.image_size).token_shape
        encoder_shape = (num_tokens, width)
    print(json.dumps({"recipe": job.recipe_name, "variant": job.variant, **recipe_to_json(recipe)}, indent=1))
    if makes_shapes:
        print(f"first:  makes the Shapes data, {ShapesSettings()}")
    print(f"reads:  {storage}/data/{recipe.dataset}, {storage}/features (encoded first where missing)")
    print(f"writes: {job.run}, copies of the features in {default_cache()}")
    describe(job, build_vocabulary(recipe, table), encoder_shape, len(table.rows("train")))


def train(job: Job[CrossAttentionCaptionerRecipe]) -> dict[str, Any]:
    """Make what is missing (Shapes, the frozen features), then train. Returns the run's summary."""
    check_new_run(job)
    recipe, storage = job.recipe, job.storage
    if job.options.stream and recipe.flip:
        raise InputError("--stream reads one view of each image; add --no-flip")
    if job.options.dry_run:
        dry_run(job)
        return {}
    ensure_dataset(storage, recipe.dataset)
    table = read_captions(storage, recipe.dataset, recipe.split)
    num_steps(recipe.train, len(table.rows("train")))  # too few rows are refused before anything is encoded
    vocabulary = build_vocabulary(recipe, table)
    columns = [
        cached_image_column(
            storage,
            recipe.dataset,
            encoder=recipe.encoder,
            image_size=recipe.image_size,
            flip=flip,
            stall_timeout_s=job.options.stall_timeout,
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    encoder_shape = (int(np.prod(columns[0].shape[:-1])), columns[0].shape[-1])
    describe(job, vocabulary, encoder_shape, len(table.rows("train")))
    facts = CaptionerFacts(
        vocabulary.to_json(),
        *encoder_shape,
        columns[0].encoder_fingerprint,
        table.facts["fingerprint"],
        tuple(column.folder.name for column in columns),
    )
    datasets = None
    if job.options.stream:
        connect()
        image_ids = [table.image_ids[row] for row in table.rows("train")]
        datasets = {"train": streamed_column(columns[0], image_ids, job.options.num_workers)}
    return run_training(job, setup, facts, datasets)


def main() -> None:
    train(parse_job(__file__, VARIANTS, __doc__ or ""))


if __name__ == "__main__":
    run(main)
