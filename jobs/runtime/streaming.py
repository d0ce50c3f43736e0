"""Rows of a captioner through Ray Data, for data that no worker's disk holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.data import Dataset

from jobs.runtime.features import CachedColumn
from jobs.runtime.sweep import READERS_PER_WORKER
from mmcore.captioners.caption_rows import CaptionRows
from mmcore.rows import Batch
from mmcore.seeding import derive_seed

# A streamed run shuffles among this many batches.
_SHUFFLE_BATCHES = 32


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
