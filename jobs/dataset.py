"""Frozen work, done once by Ray Data: the image column that a recipe trains on, cached in the storage."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import Dataset

from jobs.sweep import plan_blocks, run_sweep
from mmcore.captioners.vision import SCRATCH, FrozenVisionEncoder, pixels_from_bytes
from mmcore.data.captions import CaptionRows, read_dataset_facts
from mmcore.data.columns import SUCCESS
from mmcore.seeding import derive_seed
from mmcore.storage import Storage
from mmcore.training import Batch

# Stands for an encoder's fingerprint where the recipe trains its own.
PIXELS = "pixels"
# Rows that an encoder takes at once.
_ENCODE_BATCH = 32
# A streamed run shuffles among this many batches.
_SHUFFLE_BATCHES = 32


class EncodeImages:
    """Images -> one tensor each: frozen tokens in fp16, or the squashed pixels for a recipe that trains its encoder."""

    def __init__(self, encoder: str, image_size: int, flip: bool) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder = None if encoder == SCRATCH else FrozenVisionEncoder(encoder, image_size, device)
        self.image_size, self.flip = image_size, flip

    def __call__(self, rows: dict[str, Any]) -> pa.Table:
        values: list[bytes] = []
        shape: tuple[int, ...] = ()
        for start in range(0, len(rows["image"]), _ENCODE_BATCH):
            stop = start + _ENCODE_BATCH
            pixels = pixels_from_bytes(rows["image"][start:stop], self.image_size, rows["file_name"][start:stop])
            if self.flip:
                pixels = np.ascontiguousarray(pixels[:, :, ::-1])
            batch = pixels if self.encoder is None else self.encoder(pixels).half().cpu().numpy()
            shape = batch.shape[1:]
            values += [value.tobytes() for value in batch]
        # The shape travels in the schema, so that a finished cache describes itself.
        schema = pa.schema(
            [("image_id", pa.string()), ("value", pa.binary())],
            metadata={"shape": json.dumps(shape), "dtype": str(batch.dtype)},
        )
        return pa.table({"image_id": rows["image_id"], "value": values}, schema=schema)


@dataclass(frozen=True)
class CachedColumn:
    """Where a cached column lies and what it holds."""

    folder: Storage
    shape: tuple[int, ...]
    dtype: str
    num_rows: int
    encoded_now: int
    encoder_fingerprint: str


def cached_image_column(
    storage: Storage,
    dataset: str,
    *,
    encoder: str,
    image_size: int,
    flip: bool = False,
    stall_timeout_s: float | None = None,
) -> CachedColumn:
    """The image column of a prepared dataset; encoded now only where no run has done it before.

    The key of the cache hashes the encoder's weights, its input and the dataset, so a second run, another recipe
    with the same encoder and a restart find it.
    """
    facts = read_dataset_facts(storage, dataset)
    if Path(encoder).is_dir():
        encoder = str(Path(encoder).absolute())  # a worker's working directory is not the driver's
    what = PIXELS if encoder == SCRATCH else FrozenVisionEncoder(encoder, image_size).fingerprint()
    key = hashlib.sha256(json.dumps([what, image_size, flip, facts["fingerprint"]]).encode()).hexdigest()[:24]
    folder = storage / "features" / key
    encoded_now = 0
    if not folder.exists(SUCCESS):
        blocks = plan_blocks(storage / "data" / dataset)
        view = "mirrored " if flip else ""
        done = run_sweep(
            what=f"encode {view}{dataset} with {encoder}",
            out=folder,
            settings={"features": key},  # whatever the encoder's folder is called today
            blocks=blocks,
            worker_type=EncodeImages,
            worker_kwargs={"encoder": encoder, "image_size": image_size, "flip": flip},
            stall_timeout_s=stall_timeout_s,
        )
        encoded_now = done["rows_done_now"]
        _finish(folder, key, blocks.num_rows)
    facts = json.loads(folder.read(SUCCESS))
    return CachedColumn(folder, tuple(facts["shape"]), facts["dtype"], facts["num_rows"], encoded_now, what)


def streamed_column(column: CachedColumn, image_ids: Sequence[str]) -> Dataset:
    """The rows `image_ids` of a cached column as a Ray Dataset, for ``get_dataset_shard``."""
    filesystem, path = (column.folder / "parts").arrow()
    wanted = frozenset(image_ids)
    dataset = ray.data.read_parquet(path, filesystem=filesystem)
    return dataset.filter(lambda row: row["image_id"] in wanted, num_cpus=0.25)


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

    filesystem, path = (folder / "parts").arrow()
    first = (folder / "parts").list(".parquet")[0]
    metadata = pq.read_schema(f"{path}/{first}", filesystem=filesystem).metadata
    facts = {
        "fingerprint": key,
        "num_rows": num_rows,
        "shape": json.loads(metadata[b"shape"]),
        "dtype": metadata[b"dtype"].decode(),
    }
    folder.write(SUCCESS, json.dumps(facts).encode())
