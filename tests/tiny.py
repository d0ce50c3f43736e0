"""A captioner, its data and a run, small enough for a test to train in seconds."""

import dataclasses
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from mmcore.captioners.caption_rows import CaptionRows
from mmcore.captioners.cross_attention import (
    VARIANTS,
    CrossAttentionCaptioner,
    CrossAttentionCaptionerRecipe,
)
from mmcore.captioners.facts import CaptionerFacts
from mmcore.data.columns import Column
from mmcore.data.prepared import CaptionTable
from mmcore.recipe import TrainSettings
from mmcore.storage import Storage
from mmcore.text import WordVocabulary
from mmcore.training import RunHooks, Training

COLOURS = ("red", "green", "blue", "yellow")
PLACES = ("left", "right", "top", "bottom", "middle")
ENCODER_WIDTH, NUM_TOKENS = 16, 4


def captions_of(row: int) -> list[str]:
    """Two captions of different lengths. The words of an image depend on its number only."""
    colour, place = COLOURS[row % len(COLOURS)], PLACES[row % len(PLACES)]
    return [f"a {colour} square", f"there is a {colour} square at the {place} of it"]


def table(num_train: int, num_validation: int) -> CaptionTable:
    num_rows = num_train + num_validation
    return CaptionTable(
        image_ids=[f"image-{row}" for row in range(num_rows)],
        file_names=[f"image-{row}.png" for row in range(num_rows)],
        captions=[captions_of(row) for row in range(num_rows)],
        splits=["train"] * num_train + ["validation"] * num_validation,
        facts={"fingerprint": "tiny"},
    )


def recipe(**train: Any) -> CrossAttentionCaptionerRecipe:
    """Frozen tokens of width 16 and a decoder of width 32. `train` overrides the training settings."""
    settings = TrainSettings(
        num_epochs=4,
        batch_size=8,
        lr=3e-3,
        warmup_steps=3,
        schedule="cosine",
        precision="fp32",
        checkpoint_every_steps=3,
        log_every_steps=1,
        num_samples=2,
    )
    return dataclasses.replace(
        VARIANTS["best"],
        captions_per_image=2,
        min_word_count=1,
        image_size=64,
        width=32,
        num_layers=2,
        num_heads=2,
        ffn_width=64,
        max_length=16,
        flip=False,
        dropout=0.0,
        image_dropout=0.0,
        train=dataclasses.replace(settings, **train),
    )


def rows_of(recipe: CrossAttentionCaptionerRecipe, num_train: int = 40, num_validation: int = 12) -> CaptionRows:
    """Random frozen tokens. With `flip`, the mirrored view has other tokens."""
    facts = table(num_train, num_validation)
    shape = (num_train + num_validation, NUM_TOKENS, ENCODER_WIDTH)
    views = [
        Column(tuple(facts.image_ids), np.random.default_rng(view).normal(size=shape).astype(np.float16))
        for view in range(2 if recipe.flip else 1)
    ]
    return CaptionRows(
        facts,
        views,
        vocabulary(recipe, facts),
        captions_per_image=recipe.captions_per_image,
        max_length=recipe.max_length,
        seed=recipe.train.seed,
    )


def vocabulary(recipe: CrossAttentionCaptionerRecipe, facts: CaptionTable | None = None) -> WordVocabulary:
    captions = [text for captions in (facts or table(40, 12)).captions for text in captions]
    return WordVocabulary.build(captions, min_count=recipe.min_word_count, lowercase=recipe.lowercase)


def model_of(recipe: CrossAttentionCaptionerRecipe, seed: int = 0) -> CrossAttentionCaptioner:
    torch.manual_seed(seed)
    return recipe.build(CaptionerFacts(vocabulary(recipe).token_ids, NUM_TOKENS, ENCODER_WIDTH))


@dataclasses.dataclass
class Run:
    """The results of a run in this process."""

    training: Training
    best: dict[str, Tensor]
    checkpoints: list[Path]


def train(
    recipe: CrossAttentionCaptionerRecipe,
    folder: Path,
    *,
    resume_from: Path | None = None,
    model: CrossAttentionCaptioner | None = None,
    **rows: int,
) -> Run:
    """Train in this process and keep every checkpoint under `folder`."""
    kept: list[Path] = []

    def commit(checkpoint: Path | None, metrics: dict[str, Any]) -> None:
        if checkpoint is not None:
            kept.append(Path(shutil.move(checkpoint, folder / checkpoint.name)))

    folder.mkdir(parents=True, exist_ok=True)
    training = Training(
        model_of(recipe) if model is None else model,
        rows_of(recipe, **rows),
        recipe.train,
        RunHooks(commit=commit, samples=lambda model, step: {"step": step}),
        workdir=folder / "work",
        resume_from=resume_from,
    )
    return Run(training, training.run(), kept)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def write_dataset(
    storage: Storage, name: str = "tiny", num_train: int = 40, num_validation: int = 8, split: str = "split"
) -> None:
    """A prepared dataset in the form of `jobs/prepare.py`: squares in four colours. `split` names its split column."""
    images = []
    for row in range(num_train + num_validation):
        image = Image.new("RGB", (32, 32), "white")
        image.paste(COLOURS[row % len(COLOURS)], (row % 5 * 5, row % 3 * 8, row % 5 * 5 + 10, row % 3 * 8 + 10))
        image.putpixel((31, 31), (row, row, row))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        images.append(buffer.getvalue())
    facts = table(num_train, num_validation)
    columns = pa.table(
        {
            "image_id": facts.image_ids,
            "file_name": facts.file_names,
            "image": images,
            "captions": facts.captions,
            split: facts.splits,
        }
    )
    buffer = io.BytesIO()
    pq.write_table(columns, buffer)
    folder = storage / "data" / name
    folder.write("part-00000.parquet", buffer.getvalue())
    fingerprint = hashlib.sha256(buffer.getvalue()).hexdigest()
    folder.write("_SUCCESS", json.dumps({"dataset": name, "fingerprint": fingerprint}).encode())


def no_pickles(run: Storage) -> None:
    """Assert that a run's folder has no pickles, and no file types that could be one."""
    files = [path for path in Path(run.uri).rglob("*") if path.is_file()]
    assert files
    kinds = {path.suffix for path in files if not path.name.startswith((".", "_", "events"))}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".png"}, kinds
    for path in files:
        # A pickle of protocol 2 or later begins with these bytes; a zip with one (torch.save) begins with PK.
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path
