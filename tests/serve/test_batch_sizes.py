"""The counts of batch sizes."""

import asyncio
import contextlib
import threading

from serving import HANG_S, run

from serve.batching import Batcher


def test_a_batch_is_counted_though_its_first_caller_hung_up() -> None:
    at_work, go = threading.Event(), threading.Event()

    def work(group: object, payloads: list[int], on_step: object) -> list[int]:
        at_work.set()
        assert go.wait(HANG_S)
        return payloads

    async def main() -> list[int | None]:
        batcher: Batcher[int, int] = Batcher(work, batch_size=3, wait_s=5.0)
        first, *others = [asyncio.ensure_future(batcher.submit("group", i)) for i in range(3)]
        await asyncio.to_thread(at_work.wait, HANG_S)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        go.set()
        sizes = [(await each).batch_size for each in others]
        batcher.close()
        return sizes

    assert run(main()) == [3, None]
