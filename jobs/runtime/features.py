"""Frozen work, done once by Ray Data: the columns that recipes train on, cached in the storage.

A column holds one tensor an image: pixels, the tokens of a frozen vision encoder, the latents of a trained VQ-VAE, or
the hidden states of a frozen text encoder for the image's captions.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Dataset

from jobs.prepare import SHAPES, PrepareSettings, prepare
from jobs.runtime.blocks import ROWS_PER_BLOCK, Blocks, blocks_of_rows
from jobs.runtime.image_blocks import plan_blocks
from jobs.runtime.sweep import READERS_PER_WORKER, run_sweep
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.data.columns import SUCCESS
from mmcore.data.prepared import CaptionTable, read_dataset_facts
from mmcore.frozen.pretrained import absolute_folder
from mmcore.frozen.text import NO_TEXT, FrozenTextEncoder
from mmcore.frozen.vision import SCRATCH, FrozenVisionEncoder, pixels_from_bytes
from mmcore.rows import Batch
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_autoencoder

# Stands for an encoder's fingerprint where the recipe trains its own.
PIXELS = "pixels"
# Rows that an encoder takes at once.
_ENCODE_BATCH = 32
# A streamed run shuffles among this many batches.
_SHUFFLE_BATCHES = 32
# Hidden states of no text, beside a column of texts.
_NULL = "null.npy"


def ensure_dataset(storage: Storage, dataset: str) -> None:
    """Make the built-in data where it is wanted and missing. Any settings will do: somebody may have made more."""
    if dataset == SHAPES and not (storage / "data" / SHAPES).exists(SUCCESS):
        prepare(PrepareSettings(dataset=SHAPES, storage=storage.uri))


# -- what encodes, on the workers ----------------------------------------------------------------------------------


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _column_table(image_ids: Sequence[str], values: np.ndarray) -> pa.Table:
    """One tensor an image. The shape travels in the schema, so that a finished cache describes itself."""
    schema = pa.schema(
        [("image_id", pa.string()), ("value", pa.binary())],
        metadata={"shape": json.dumps(values.shape[1:]), "dtype": str(values.dtype)},
    )
    return pa.table({"image_id": image_ids, "value": [value.tobytes() for value in values]}, schema=schema)


def _pixel_batches(rows: dict[str, Any], image_size: int, flip: bool) -> Iterator[np.ndarray]:
    """The images of `rows` as uint8 (B, P, P, 3), mirrored with `flip`, a batch at a time."""
    for start in range(0, len(rows["image"]), _ENCODE_BATCH):
        stop = start + _ENCODE_BATCH
        pixels = pixels_from_bytes(rows["image"][start:stop], image_size, rows["file_name"][start:stop])
        yield np.ascontiguousarray(pixels[:, :, ::-1]) if flip else pixels


class EncodeImages:
    """Images -> frozen tokens in fp16, or the squashed pixels for a recipe that trains its encoder."""

    def __init__(self, encoder: str, image_size: int, flip: bool) -> None:
        self.encoder = None if encoder == SCRATCH else FrozenVisionEncoder(encoder, image_size, _device())
        self.image_size, self.flip = image_size, flip

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        batches = _pixel_batches(rows, self.image_size, self.flip)
        if self.encoder is None:
            values = list(batches)
        else:
            values = [self.encoder(pixels).half().cpu().numpy() for pixels in batches]
        return _column_table(rows["image_id"], np.concatenate(values))


class EncodeLatents:
    """Images -> latents (C, h, w) of a trained VQ-VAE before they are quantised, in fp16."""

    def __init__(self, vqvae: Storage, flip: bool) -> None:
        self.vqvae, self.flip = open_autoencoder(vqvae.uri).load(_device()), flip

    @torch.inference_mode()
    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        values = []
        for pixels in _pixel_batches(rows, self.vqvae.image_size, self.flip):
            values.append(self.vqvae.encode(pixels).half().cpu().numpy())
        return _column_table(rows["image_id"], np.concatenate(values))


class EncodeText:
    """Captions -> hidden states (K, T, E) of a frozen text encoder in fp16; zeros where an image has fewer."""

    def __init__(self, encoder: str, max_tokens: int, captions_per_image: int) -> None:
        self.encoder = FrozenTextEncoder(encoder, max_tokens, _device())
        self.captions_per_image = captions_per_image

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        # As many captions at once as images, several times over: these are short.
        texts = [text for captions in rows["captions"] for text in captions]
        hidden = [
            self.encoder(texts[start : start + 2 * _ENCODE_BATCH]).half().cpu().numpy()
            for start in range(0, len(texts), 2 * _ENCODE_BATCH)
        ]
        hidden_NTE = np.concatenate(hidden)
        values = np.zeros((len(rows["captions"]), self.captions_per_image, *hidden_NTE.shape[1:]), np.float16)
        start = 0
        for row, captions in enumerate(rows["captions"]):
            values[row, : len(captions)] = hidden_NTE[start : start + len(captions)]
            start += len(captions)
        return _column_table(rows["image_id"], values)


# -- columns -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedColumn:
    """Where a cached column lies and what it holds."""

    folder: Storage
    shape: tuple[int, ...]
    dtype: str
    num_rows: int
    encoded_now: int
    encoder_fingerprint: str


def _cached_column(
    storage: Storage,
    *,
    what: str,
    encoder_fingerprint: str,
    key: list[Any],
    blocks: Callable[[], Blocks],
    worker_type: type,
    worker_kwargs: dict[str, Any],
    stall_timeout_s: float | None,
) -> CachedColumn:
    """The column that `key` names; made now only where no run has done it before.

    `key` holds all that decides the values, weights and data by their fingerprints, so a second run, another recipe
    with the same encoder and a restart find it.
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
        _finish(folder, digest, plan.num_rows)
    facts = json.loads(folder.read(SUCCESS))
    return CachedColumn(
        folder, tuple(facts["shape"]), facts["dtype"], facts["num_rows"], encoded_now, encoder_fingerprint
    )


def cached_image_column(
    storage: Storage,
    dataset: str,
    *,
    encoder: str,
    image_size: int,
    flip: bool = False,
    stall_timeout_s: float | None = None,
) -> CachedColumn:
    """The images of a prepared dataset: tokens of the frozen `encoder`, or with `scratch` pixels."""
    facts = read_dataset_facts(storage, dataset)
    encoder = absolute_folder(encoder)
    fingerprint = PIXELS if encoder == SCRATCH else FrozenVisionEncoder(encoder, image_size).fingerprint()
    view = "mirrored " if flip else ""
    return _cached_column(
        storage,
        what=f"encode {view}{dataset} with {encoder}",
        encoder_fingerprint=fingerprint,
        key=[fingerprint, image_size, flip, facts["fingerprint"]],
        blocks=lambda: plan_blocks(storage / "data" / dataset),
        worker_type=EncodeImages,
        worker_kwargs={"encoder": encoder, "image_size": image_size, "flip": flip},
        stall_timeout_s=stall_timeout_s,
    )


def cached_latent_column(
    storage: Storage, dataset: str, *, vqvae: Storage, flip: bool = False, stall_timeout_s: float | None = None
) -> CachedColumn:
    """The images of a prepared dataset as latents (C, h, w) of the trained `vqvae`, a finished run."""
    facts, fingerprint = read_dataset_facts(storage, dataset), open_autoencoder(vqvae.uri).load().fingerprint()
    view = "mirrored " if flip else ""
    return _cached_column(
        storage,
        what=f"encode {view}{dataset} with {vqvae}",
        encoder_fingerprint=fingerprint,
        key=["latents", fingerprint, flip, facts["fingerprint"]],
        blocks=lambda: plan_blocks(storage / "data" / dataset),
        worker_type=EncodeLatents,
        worker_kwargs={"vqvae": vqvae, "flip": flip},
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
    column = _cached_column(
        storage,
        what=f"encode captions with {encoder.name}",
        encoder_fingerprint=fingerprint,
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


def streamed_column(column: CachedColumn, image_ids: Sequence[str], num_workers: int) -> Dataset:
    """The rows `image_ids` of a cached column as a Ray Dataset, for ``get_dataset_shard`` of `num_workers` workers."""
    parts = column.folder / "parts"
    filesystem, path = parts.arrow()
    wanted = frozenset(image_ids)
    dataset = ray.data.read_parquet(path, filesystem=filesystem)
    # Each fraction of a CPU would start a process of its own; Ray warns of more of them than there are files.
    filters = ray.data.TaskPoolStrategy(size=min(READERS_PER_WORKER * num_workers, len(parts.list(".parquet"))))
    return dataset.filter(lambda row: row["image_id"] in wanted, num_cpus=0.25, compute=filters)


class StreamedCaptionRows(CaptionRows):
    """Training rows from this worker's shard of a Ray Dataset; validation rows by lookup, as they are few."""

    def __init__(self, *arguments: Any, shard: Any, shape: tuple[int, ...], dtype: str, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.shard, self.shape, self.dtype = shard, shape, np.dtype(dtype)
        self.row_of = {image_id: row for row, image_id in enumerate(self.image_ids)}

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch]:
        batches = self.shard.iter_batches(
            batch_size=rows_per_batch,
            drop_last=True,
            local_shuffle_buffer_size=_SHUFFLE_BATCHES * rows_per_batch,
            local_shuffle_seed=derive_seed(self.seed, "stream", epoch) % 2**32,
        )
        for batch in batches:
            images = np.stack([np.frombuffer(value, self.dtype).reshape(self.shape) for value in batch["value"]])
            rows = np.array([self.row_of[image_id] for image_id in batch["image_id"]])
            yield self.with_captions(torch.from_numpy(images), rows)


def _finish(folder: Storage, key: str, num_rows: int) -> None:
    import pyarrow.parquet as pq

    parts = folder / "parts"
    with parts.open(parts.list(".parquet")[0]) as first:
        metadata = pq.read_schema(first).metadata
    facts = {
        "fingerprint": key,
        "num_rows": num_rows,
        "shape": json.loads(metadata[b"shape"]),
        "dtype": metadata[b"dtype"].decode(),
    }
    folder.write(SUCCESS, json.dumps(facts).encode())
