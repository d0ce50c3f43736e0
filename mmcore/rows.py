"""The rows that a model trains on, and how they reach the loop."""

import queue
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from torch import Tensor

Batch = dict[str, Tensor]
# Batches that are put together while the step before them runs.
_PREFETCH = 2
# Seconds that a reader of batches which somebody else keeps waiting is waited for when the training ends.
_JOIN_S = 5.0


class Rows(Protocol):
    """The rows that a model trains on."""

    num_train: int
    num_validation: int

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        """The training rows `indices`, augmented as (seed, epoch, image_id) say."""

    def validation_batch(self, indices: np.ndarray) -> Batch:
        """The validation rows `indices`, as they are."""

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        """This worker's batches of an epoch where rows cannot be looked up by index, else None."""


def prefetched(batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
    """`batches`, put together on a thread while the caller computes."""
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
