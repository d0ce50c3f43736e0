"""Outputs of frozen encoders: computed once by Ray Data and cached in the storage as columns.

A column holds one tensor per image. It contains pixels, image tokens of a frozen vision encoder, or latents or codes of
a trained autoencoder. A column of captions holds the hidden states of a frozen text encoder.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.runtime.blocks import ROWS_PER_BLOCK, Blocks, blocks_of_rows
from jobs.runtime.encoders import AutoencoderOutput, EncodeByAutoencoder, EncodeImages, EncodeText
from jobs.runtime.image_blocks import plan_blocks
from jobs.runtime.job import Job
from jobs.runtime.sweep import run_sweep
from mmcore.data.columns import SUCCESS, TensorSpec, facts_of_parts, specs_of
from mmcore.data.prepared import CaptionTable, read_dataset_facts
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import NO_TEXT, FrozenTextEncoder
from mmcore.frozen.vision import PATCH, SCRATCH, FrozenVisionEncoder, Tokens
from mmcore.storage import Storage

# Stands for an encoder's fingerprint where the recipe trains its own.
PIXELS = "pixels"
# Hidden states of no text, beside a column of texts.
_NULL = "null.npy"


# -- columns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedColumn:
    """Where a cached column lies and what it holds."""

    folder: Storage
    tensors: dict[str, TensorSpec]
    """Of an image, by name; a sole one is called `VALUE`."""
    encoded_now: int


def cached_column(
    storage: Storage,
    *,
    what: str,
    key: list[Any],
    blocks: Callable[[], Blocks],
    worker_type: type,
    worker_kwargs: dict[str, Any],
    stall_timeout_s: float | None,
) -> CachedColumn:
    """The column of `key`. It is computed only if it is not in the cache.

    `key` holds everything that determines the values, with fingerprints of weights and data. Later runs, restarts and
    other recipes with the same encoder therefore use the same column.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    folder = storage / "features" / digest
    encoded_now = 0
    if not folder.exists(SUCCESS):
        plan = blocks()
        done = run_sweep(
            what=what,
            out=folder,
            settings={"features": digest},  # whatever the encoder's folder is called today
            blocks=plan,
            worker_type=worker_type,
            worker_kwargs=worker_kwargs,
            stall_timeout_s=stall_timeout_s,
        )
        encoded_now = done["rows_done_now"]
        facts = {"fingerprint": digest, "num_rows": plan.num_rows, **facts_of_parts(folder)}
        folder.write(SUCCESS, json.dumps(facts).encode())
    tensors = specs_of(json.loads(folder.read(SUCCESS)), str(folder))
    return CachedColumn(folder, tensors, encoded_now)


def cached_image_column(
    storage: Storage,
    dataset: str,
    *,
    encoder: str,
    image_size: int,
    tokens: Tokens = PATCH,
    flip: bool = False,
    num_views: int = 1,
    stall_timeout_s: float | None = None,
) -> CachedColumn:
    """The images of a prepared dataset: tokens of the frozen `encoder`, or with `scratch` pixels.

    `num_views`: how many columns of views the caller asks for, the mirrored one last; it is told beside the progress.
    """
    facts = read_dataset_facts(storage, dataset)
    encoder = absolute_folder(encoder)
    view = _view(flip, num_views)
    fingerprint, what = PIXELS, f"read the pixels of {dataset}{view.rstrip(',')}"
    if encoder != SCRATCH:
        fingerprint = FrozenVisionEncoder(encoder, image_size, tokens=tokens).fingerprint()
        what = f"encode {dataset}{view} with {encoder}"
    return cached_column(
        storage,
        what=what,
        key=[fingerprint, image_size, flip, facts["fingerprint"]],
        blocks=lambda: plan_blocks(storage / "data" / dataset),
        worker_type=EncodeImages,
        worker_kwargs={"encoder": encoder, "image_size": image_size, "flip": flip, "tokens": tokens},
        stall_timeout_s=stall_timeout_s,
    )


def _view(flip: bool, num_views: int) -> str:
    return f", view {1 + flip} of {num_views}{', mirrored,' if flip else ','}" if num_views > 1 else ""


def cached_pixels(job: Job[Any]) -> CachedColumn:
    """The pixels of the images that `job` trains on, at its recipe's size."""
    return cached_image_column(
        job.storage,
        job.recipe.dataset,
        encoder=SCRATCH,
        image_size=job.recipe.image_size,
        stall_timeout_s=job.options.stall_timeout,
    )


def cached_autoencoder_column(
    storage: Storage,
    dataset: str,
    *,
    output: AutoencoderOutput,
    run: Storage,
    fingerprint: str,
    flip: bool = False,
    num_views: int = 1,
    split: str | None = None,
    stall_timeout_s: float | None = None,
) -> CachedColumn:
    """The images of a prepared dataset as latents (C, h, w) or codes (h, w) of the trained autoencoder `run`.

    Args:
        fingerprint: of the autoencoder. Its weights are read only where something is encoded, and checked there.
        num_views: how many columns of views the caller asks for, the mirrored one last.
        split: ``COLUMN:NAME`` takes the images of one split alone.
    """
    facts = read_dataset_facts(storage, dataset)
    return cached_column(
        storage,
        what=f"encode {dataset}{_view(flip, num_views)} with {run}",
        key=[output, fingerprint, flip, facts["fingerprint"], *([split] if split else [])],
        blocks=lambda: plan_blocks(storage / "data" / dataset, split),
        worker_type=EncodeByAutoencoder,
        worker_kwargs={"run": run, "fingerprint": fingerprint, "output": output, "flip": flip},
        stall_timeout_s=stall_timeout_s,
    )


def cached_text_column(
    storage: Storage,
    table: CaptionTable,
    *,
    encoder: FrozenTextEncoder,
    max_tokens: int,
    captions_per_image: int,
    stall_timeout_s: float | None = None,
) -> CachedColumn:
    """The first `captions_per_image` captions of each image as hidden states (K, T, E) of a frozen text encoder.

    The hidden states of no text are kept beside it: `read_null`.
    """
    captions, fingerprint = [row[:captions_per_image] for row in table.captions], encoder.fingerprint()
    name = absolute_folder(encoder.name)
    column = cached_column(
        storage,
        what=f"encode captions with {encoder.name}",
        key=["text", fingerprint, captions_per_image, table.facts["fingerprint"]],
        blocks=lambda: blocks_of_rows({"image_id": table.image_ids, "captions": captions}, ROWS_PER_BLOCK),
        worker_type=EncodeText,
        worker_kwargs={"encoder": name, "max_tokens": max_tokens, "captions_per_image": captions_per_image},
        stall_timeout_s=stall_timeout_s,
    )
    if not column.folder.exists(_NULL):
        buffer = io.BytesIO()
        np.save(buffer, encoder([NO_TEXT])[0].half().cpu().numpy(), allow_pickle=False)
        column.folder.write(_NULL, buffer.getvalue())
    return column


def read_null(folder: Storage) -> np.ndarray:
    """fp16 (T, E): the hidden states of no text that belong to a column of texts."""
    return np.load(io.BytesIO(folder.read(_NULL)), allow_pickle=False)
