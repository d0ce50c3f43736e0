"""Rows of training data, and their batches for the training loop."""

import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mmcore.errors import InputError
from mmcore.recipe import TrainSettings
from mmcore.seeding import permutation

Batch = dict[str, Tensor]
# Batches that are prepared while a step runs.
_PREFETCH = 2
# Seconds to wait at the end of a training for a prefetch thread that is still blocked in a read.
_JOIN_S = 5.0


class Rows(Protocol):
    """The rows that a model trains on."""

    num_train: int
    num_validation: int

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        """The training rows `indices`, with augmentation drawn from (seed, epoch, image_id)."""

    def validation_batch(self, indices: np.ndarray) -> Batch:
        """The validation rows `indices`, without augmentation."""

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        """This worker's batches of an epoch, if rows are streamed; None if they are looked up by index."""


def micro_batches(
    rows: Rows, settings: TrainSettings, *, rank: int, world_size: int, steps_per_epoch: int, first_step: int
) -> Iterator[list[Batch]]:
    """A worker's micro-batches of each step from `first_step` on, as an endless iterator.

    Raises InputError if a streamed shard ends before its epoch.
    """
    share = settings.batch_size // world_size
    micro = share // settings.gradient_accumulation
    for epoch in itertools.count(first_step // steps_per_epoch):
        first = max(0, first_step - epoch * steps_per_epoch)
        stream = rows.train_stream(epoch, micro)
        if stream is not None:
            for _ in range(first, steps_per_epoch):
                batches = list(itertools.islice(stream, settings.gradient_accumulation))
                if len(batches) < settings.gradient_accumulation:
                    raise InputError(
                        f"the streamed shard of worker {rank} ended before epoch {epoch}; use a --batch-size "
                        "that leaves a remainder, fewer workers, or no --stream"
                    )
                yield batches
            continue
        order = permutation(rows.num_train, settings.seed, epoch)
        for step in range(first, steps_per_epoch):
            start = step * settings.batch_size + rank * share
            mine = order[start : start + share]
            yield [rows.train_batch(mine[i : i + micro], epoch) for i in range(0, share, micro)]


def prefetched(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """`batches`, prepared on another thread while the caller computes."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=_PREFETCH)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for batch in batches:
                put(batch)
                if stop.is_set():
                    return
            put(end)
        except BaseException as error:  # raised again in the caller's thread
            put(error)

    thread = threading.Thread(target=fill, name="prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(_JOIN_S)
