"""Dynamic batches of compatible requests, collected while the model computes.

`@serve.batch` fills a batch with whatever comes next. This queue differs in three ways. Two images share a batch only
with the same settings of the sampler. An image leaves the batch when its caller has gone. Each caller is told its place
in the queue and the steps that are done. An idle model begins at once, or after `wait_s`. Under load, the images that
arrive during one batch make the next one.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from mmcore.errors import InputError
from serve.errors import ApiError

# After so many failed batches in a row the model's process counts as broken: an error of CUDA does not go away.
_MAX_FAILED = 3

P = TypeVar("P")
R = TypeVar("R")


class Listener(Protocol):
    """Hears in the event loop about the progress of one item."""

    def on_queued(self, position: int) -> None:
        """`position` items are before it."""

    def on_step(self, done: int, total: int) -> None: ...


class _Silent:
    def on_queued(self, position: int) -> None: ...

    def on_step(self, done: int, total: int) -> None: ...


class Abandoned(Exception):
    """Raised by `on_step` in the model's thread when every caller of the batch has gone."""


@dataclass(eq=False)
class _Item(Generic[P, R]):
    group: Hashable
    payload: P
    listener: Listener
    future: "asyncio.Future[Batched[R]]"
    queued_at: float = field(default_factory=time.perf_counter)
    position: int = -1

    def tell_position(self, position: int) -> None:
        if position != self.position:
            self.position = position
            self.listener.on_queued(position)


@dataclass(frozen=True)
class Batched(Generic[R]):
    """The result of one item, with its times."""

    value: R
    queue_s: float
    model_s: float
    batch_size: int | None
    """Items of its batch, told of one item of each batch and None of the others, so that batches are counted once."""


class Batcher(Generic[P, R]):
    """Runs `run(group, payloads, on_step)` in the model's own thread, on at most `batch_size` payloads of one group.

    `run` gives one result a payload, in their order. It may call `on_step(done, total)`, which raises `Abandoned` once
    every caller of the batch has gone.
    """

    def __init__(
        self,
        run: Callable[[Any, list[P], Callable[[int, int], None]], Sequence[R]],
        *,
        batch_size: int,
        wait_s: float = 0.0,
        max_silence_s: float = math.inf,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        """`max_silence_s`: a batch without a step and without an end for so long counts as hanging.

        `thread`: the model's thread; by default a new one.
        """
        self.batch_size, self._wait_s, self._run = batch_size, wait_s, run
        self._max_silence_s, self._num_failed = max_silence_s, 0
        # Time of the last step of the batch at work.
        self._heard_at: float | None = None
        self._waiting: list[_Item[P, R]] = []
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # A single thread: a model computes one batch at a time.
        self._thread = thread or ThreadPoolExecutor(1, "model")

    def check(self) -> None:
        """Raises RuntimeError, or what ended the queue, while this process should be replaced by another one."""
        if self._task is not None and self._task.done():
            self._task.result()
        if self._num_failed >= _MAX_FAILED:
            raise RuntimeError(f"the last {self._num_failed} batches failed")
        heard_at = self._heard_at
        if heard_at is not None and (silence_s := time.monotonic() - heard_at) > self._max_silence_s:
            raise RuntimeError(f"the batch at work has given no sign for {silence_s:.0f} s")

    async def submit(self, group: Hashable, payload: P, listener: Listener | None = None) -> Batched[R]:
        """The result of one payload. A cancelled caller withdraws it; a batch without callers ends."""
        if self._task is not None and self._task.done():
            # A new task would hide from `check` what ended the old one.
            self._task.result()
        item: _Item[P, R] = _Item(group, payload, listener or _Silent(), asyncio.get_running_loop().create_future())
        self._waiting.append(item)
        item.tell_position(len(self._waiting) - 1)
        self._arrived.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work_for_ever())
        try:
            return await item.future
        finally:
            if item in self._waiting:
                self._waiting.remove(item)
                self._tell_positions()

    def close(self) -> None:
        """Stop working. Only tests need it: a replica ends with its process."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tell_positions(self) -> None:
        for position, item in enumerate(self._waiting):
            item.tell_position(position)

    async def _work_for_ever(self) -> None:
        while True:
            batch = await self._next_batch()
            await self._work(batch)

    async def _next_batch(self) -> list[_Item[P, R]]:
        """The item that has waited longest, and the next ones of its group."""
        while True:
            if self._waiting:
                head = self._waiting[0]
                batch = [item for item in self._waiting if item.group == head.group][: self.batch_size]
                left_s = head.queued_at + self._wait_s - time.perf_counter()
                if len(batch) == self.batch_size or left_s <= 0:
                    break
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s if self._waiting else None):
                    await self._arrived.wait()
        self._waiting = [item for item in self._waiting if item not in batch]
        self._tell_positions()
        return batch

    async def _work(self, batch: list[_Item[P, R]]) -> None:
        loop = asyncio.get_running_loop()
        batch = [item for item in batch if not item.future.done()]
        if not batch:
            return

        def tell(done: int, total: int) -> None:
            for item in batch:
                if not item.future.done():
                    item.listener.on_step(done, total)

        def on_step(done: int, total: int) -> None:
            if all(item.future.done() for item in batch):
                raise Abandoned
            self._heard_at = time.monotonic()
            loop.call_soon_threadsafe(tell, done, total)

        started_at, self._heard_at = time.perf_counter(), time.monotonic()
        try:
            payloads = [item.payload for item in batch]
            values = await loop.run_in_executor(self._thread, self._run, batch[0].group, payloads, on_step)
            assert len(values) == len(batch), f"{len(values)} results for {len(batch)} payloads"
        except Abandoned:
            return
        except Exception as error:  # whatever it is belongs to those who wait; the next batch is another matter
            # A refusal says something about the input, and nothing about the model.
            self._num_failed += not isinstance(error, ApiError | InputError)
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
            return
        finally:
            self._heard_at = None
        self._num_failed = 0
        model_s = time.perf_counter() - started_at
        # Told to the first who still waits; whoever hung up tells nobody.
        size: int | None = len(batch)
        for item, value in zip(batch, values, strict=True):
            if not item.future.done():
                item.future.set_result(Batched(value, started_at - item.queued_at, model_s, size))
                size = None
