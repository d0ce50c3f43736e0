"""How a captioner is trained: its tokenizer, the frozen tokens of images, sample captions, what is printed.

A model that matches images and captions is trained in the same way, on other rows.
"""

import dataclasses
import functools
import sys
from typing import Any

import ray.train
import torch
from torch import nn

from jobs.runtime.cluster import connect
from jobs.runtime.features import PIXELS, cached_image_column
from jobs.runtime.job import Job
from jobs.runtime.streaming import StreamedCaptionRows, streamed_column
from jobs.runtime.train_worker import Doing, Setup
from jobs.runtime.trainer import RunSummary
from jobs.runtime.training_flow import (
    Encoded,
    Flow,
    in_millions,
    parameters,
    say_steps,
    say_what_is_cut,
    train_by,
    train_captions,
)
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.facts import CaptionerFacts, CaptionerRecipe, tokenizer_path, tokens_of
from mmcore.catalogue import RECIPES
from mmcore.data.columns import TensorSpec, default_cache, open_column
from mmcore.data.prepared import TRAIN, VALIDATION, CaptionTable, read_captions
from mmcore.errors import InputError
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.tokenizers import read_caption_tokenizer
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder
from mmcore.run_files import TOKENIZER_ASSET
from mmcore.seeding import derive_seed
from mmcore.text import CaptionTokenizer

# Fields of a recipe that may name a folder.
_FOLDERS = ("encoder", "tokenizer", "first_weights", "text_encoder", "text_model", "language_model")
# Those of its bridge.
_BRIDGE_FOLDERS = ("instruct_tokenizer", "bridge_weights")


def train_captioner(job: Job[Any], *, rows_type: type[CaptionRows] = CaptionRows) -> RunSummary:
    """Make what is missing (Shapes, the frozen features), then train. Returns the run's summary.

    Args:
        rows_type: the rows that the model trains on.
    """
    tokenizers: list[CaptionTokenizer] = []
    num_frozen = 0
    lengths: list[int] = []

    def plan(job: Job[Any], table: CaptionTable) -> CaptionerFacts:
        nonlocal num_frozen
        recipe: CaptionerRecipe = job.recipe
        tokenizers.append(recipe.build_tokenizer(table))
        captions = train_captions(table, recipe.captions_per_image)
        lengths.extend(len(tokenizers[0].encode(caption, sys.maxsize)) for caption in captions)
        fingerprint, num_tokens, width = PIXELS, recipe.image_size**2, 3
        if recipe.encoder != SCRATCH:
            encoder = FrozenVisionEncoder(recipe.encoder, recipe.image_size, tokens=tokens_of(recipe))
            fingerprint, (num_tokens, width) = encoder.fingerprint(), encoder.token_shape
            num_frozen = parameters(encoder.model)
        facts = CaptionerFacts(
            tokenizers[0].token_ids,
            num_tokens,
            width,
            fingerprint,
            table.facts.get("fingerprint", ""),
            text_fingerprint=tokenizers[0].fingerprint(),
            text=tokenizer_path(tokenizers[0]),
        )
        return recipe.complete(facts) if hasattr(recipe, "complete") else facts

    def describe(job: Job[Any], facts: CaptionerFacts, num_train: int) -> None:
        _describe(job, facts, num_frozen, num_train)
        say_what_is_cut(job, lengths, lambda recipe: recipe.max_length, "raise --max-length")

    def encode(job: Job[Any], table: CaptionTable, facts: CaptionerFacts) -> Encoded[Any, CaptionerFacts]:
        for name, data in tokenizers[0].files().items():
            (job.storage / "/".join(facts.text)).create(name, data)
        return _encode(job, table, facts)

    def check(job: Job[Any]) -> Job[Any]:
        if job.options.stream and rows_type is not CaptionRows:
            raise InputError(f"--stream: {job.recipe_name} looks its rows up; leave the flag out")
        return _check(job)

    setup_rows = functools.partial(setup, rows_type=rows_type)
    return train_by(Flow(check, plan, describe, encode, _columns, setup_rows), job)


def _check(job: Job[Any]) -> Job[Any]:
    if job.options.stream and job.recipe.flip:
        raise InputError("--stream reads one view of each image; add --no-flip")
    # As whoever reads the finished run from elsewhere finds them.
    folders = {name: absolute_folder(getattr(job.recipe, name)) for name in _FOLDERS if hasattr(job.recipe, name)}
    recipe = dataclasses.replace(job.recipe, **folders)
    if hasattr(recipe, "bridge"):
        named = {name: absolute_folder(getattr(recipe.bridge, name)) for name in _BRIDGE_FOLDERS}
        recipe = dataclasses.replace(recipe, bridge=dataclasses.replace(recipe.bridge, **named))
    return dataclasses.replace(job, recipe=recipe)


def _describe(job: Job[Any], facts: CaptionerFacts, num_frozen: int, num_train: int) -> None:
    """Print sizes and steps; of the variant `report` also the sizes of the report, and why they are not met."""
    recipe: CaptionerRecipe = job.recipe
    model = recipe.build(facts)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    entry = RECIPES.get(job.recipe_name) if job.variant == "report" else None
    table_1 = entry.table_1 if entry else None
    theirs = f" (Table 1: {table_1[0]} M and {table_1[1]} M)" if table_1 else ""
    sizes = f"{in_millions(parameters(model) + num_frozen)} in all, {in_millions(trainable)} trainable{theirs}"
    print(
        f"parameters of {job.recipe_name}: {sizes}; vocabulary {facts.token_ids.size:,} words",
        flush=True,
    )
    say_steps(job, num_train)
    if entry and entry.remark:
        print(entry.remark, flush=True)


def _encode(job: Job[Any], table: CaptionTable, facts: CaptionerFacts) -> Encoded[Any, CaptionerFacts]:
    recipe: CaptionerRecipe = job.recipe
    columns = [
        cached_image_column(
            job.storage,
            recipe.dataset,
            encoder=recipe.encoder,
            image_size=recipe.image_size,
            tokens=tokens_of(recipe),
            flip=flip,
            num_views=1 + recipe.flip,
            stall_timeout_s=job.options.stall_timeout,
        )
        for flip in ([False, True] if recipe.flip else [False])
    ]
    datasets = None
    if job.options.stream:
        connect()
        image_ids = [table.image_ids[row] for row in table.rows(TRAIN)]
        datasets = {"train": streamed_column(columns[0], image_ids, job.options.num_workers)}
    names = tuple(column.folder.name for column in columns)
    return Encoded(job, dataclasses.replace(facts, columns=names), datasets)


def _columns(job: Job[Any], facts: CaptionerFacts) -> dict[str, TensorSpec]:
    recipe: CaptionerRecipe = job.recipe
    if recipe.encoder == SCRATCH:
        what, spec = "pixels", TensorSpec("uint8", (recipe.image_size, recipe.image_size, 3))
    else:
        what, spec = "tokens", TensorSpec("float16", (facts.image_tokens, facts.encoder_width))
    return {what: spec, f"mirrored_{what}": spec} if recipe.flip else {what: spec}


def setup(job: Job[Any], facts: CaptionerFacts, doing: Doing, *, rows_type: type[CaptionRows] = CaptionRows) -> Setup:
    """Model and rows, on a worker."""
    recipe: CaptionerRecipe = job.recipe
    text = job.storage / "/".join(facts.text)
    tokenizer = read_caption_tokenizer(text)
    table = read_captions(job.storage, recipe.dataset, recipe.split)
    folders = [job.storage / "features" / key for key in facts.columns]
    keywords = {
        "captions_per_image": recipe.captions_per_image,
        "max_length": recipe.max_length,
        "seed": recipe.train.seed,
    }
    rows: CaptionRows
    if job.options.stream:
        only = [table.image_ids[row] for row in table.rows(VALIDATION)]
        views = [open_column(folder, default_cache(), only, doing) for folder in folders]
        shard = ray.train.get_dataset_shard("train")
        shape, dtype = views[0].values.shape[1:], str(views[0].values.dtype)
        rows = StreamedCaptionRows(table, views, tokenizer, shard=shard, shape=shape, dtype=dtype, **keywords)
    else:
        views = [open_column(folder, default_cache(), doing=doing) for folder in folders]
        rows = rows_type(table, views, tokenizer, **keywords)
    torch.manual_seed(derive_seed(recipe.train.seed, "weights"))
    model = recipe.build(facts)
    if hasattr(model, "load_pretrained"):
        model.load_pretrained()  # type: ignore[operator]

    def samples(model: nn.Module, step: int) -> dict[str, Any]:
        if not hasattr(model, "caption"):
            return {}
        chosen = rows.validation[: recipe.train.num_samples]
        parameter = next(model.parameters())
        images = rows.images(chosen, None).to(parameter.device)
        images = images.to(parameter.dtype) if images.is_floating_point() else images
        # In bf16 training, frozen layers have bf16 weights, which take fp32 inputs only under autocast.
        has_bf16 = any(each.dtype == torch.bfloat16 for each in model.parameters())
        with torch.autocast(parameter.device.type, torch.bfloat16, enabled=has_bf16):
            captions = [tokenizer.decode(ids) for ids in model.caption(images)]  # type: ignore[operator]
        return dict(zip([rows.image_ids[row] for row in chosen], captions, strict=True))

    return Setup(model, rows, samples, {TOKENIZER_ASSET: text})
