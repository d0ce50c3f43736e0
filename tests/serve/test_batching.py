"""Batches of compatible requests: grouping, order, cancellation, progress, and isolated faults."""

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from serving import HANG_S, SIZE, Served, run, until, wanted

from mmcore.errors import InputError
from serve import batching
from serve.batching import Abandoned, Batcher
from serve.errors import bad_value
from serve.limits import Limits


class Recorder:
    """Doubles numbers, records every batch, and waits inside a batch until released."""

    def __init__(self) -> None:
        self.batches: list[tuple[Any, list[int]]] = []
        self.go = threading.Event()
        self.go.set()
        self.abandoned = 0

    def __call__(self, group: Any, payloads: list[int], on_step: Callable[[int, int], None]) -> list[int]:
        self.batches.append((group, list(payloads)))
        try:
            for step in (1, 2):
                assert self.go.wait(HANG_S)
                on_step(step, 2)
        except Abandoned:
            self.abandoned += 1
            raise
        if 13 in payloads:
            raise ValueError("thirteen")
        return [2 * payload for payload in payloads]


class Steps:
    """Records its calls."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int]] = []

    def on_queued(self, position: int) -> None:
        self.told.append(("queued", position))

    def on_step(self, done: int, total: int) -> None:
        self.told.append(("step", done))


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock for the idle time of a batch. It stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=lambda: now[0], perf_counter=time.perf_counter))
    return now


def test_batches_have_one_group_and_a_largest_size_and_keep_the_order() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=3)
        recorder.go.clear()
        first = asyncio.ensure_future(batcher.submit("a", 0))
        await until(lambda: len(recorder.batches) == 1)
        # These arrive while the first is processed.
        groups = "abababa"
        rest = [asyncio.ensure_future(batcher.submit(group, n)) for n, group in enumerate(groups, 1)]
        await until(lambda: len(batcher._waiting) == len(groups))
        recorder.go.set()
        results = await asyncio.gather(first, *rest)
        assert [result.value for result in results] == [2 * n for n in range(8)]
        # The request that waited longest decides which group is next.
        assert recorder.batches == [("a", [0]), ("a", [1, 3, 5]), ("b", [2, 4, 6]), ("a", [7])]
        # Each batch is counted once.
        assert sorted(r.batch_size for r in results if r.batch_size) == [1, 1, 3, 3]
        batcher.close()

    run(main())


def test_an_idle_model_waits_for_nobody_where_it_is_not_told_to() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=4)
        for n in range(2):
            await batcher.submit("a", n)
        assert recorder.batches == [("a", [0]), ("a", [1])]
        batcher.close()

    run(main())


def test_an_idle_model_waits_only_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # No time passes until both are there, then all of it passes at once.
    now = [time.perf_counter()]
    monkeypatch.setattr(batching, "time", SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: now[0]))

    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=4, wait_s=0.1)
        first = asyncio.ensure_future(batcher.submit("a", 0))
        await until(lambda: len(batcher._waiting) == 1)
        batcher._waiting[0].queued_at = now[0]
        await asyncio.sleep(0.3)
        assert not recorder.batches
        second = asyncio.ensure_future(batcher.submit("a", 1))
        await until(lambda: len(batcher._waiting) == 2)
        now[0] = math.inf
        await asyncio.gather(first, second)
        assert recorder.batches == [("a", [0, 1])]
        batcher.close()

    run(main())


def test_a_full_batch_does_not_wait() -> None:
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(Recorder(), batch_size=2, wait_s=math.inf)
        await asyncio.gather(batcher.submit("a", 1), batcher.submit("a", 2))
        batcher.close()

    run(main())


def test_who_is_cancelled_in_the_queue_is_never_worked_at() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=8)
        recorder.go.clear()
        first = asyncio.ensure_future(batcher.submit("a", 0))
        await until(lambda: len(recorder.batches) == 1)
        waiting = [asyncio.ensure_future(batcher.submit("a", n)) for n in (1, 2, 3)]
        await until(lambda: len(batcher._waiting) == 3)
        waiting[1].cancel()
        await until(lambda: len(batcher._waiting) == 2)
        recorder.go.set()
        await asyncio.gather(first, waiting[0], waiting[2])
        assert recorder.batches[1] == ("a", [1, 3])
        batcher.close()

    run(main())


def test_a_batch_ends_when_nobody_waits_for_it_and_not_before() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=8, wait_s=0.05)
        recorder.go.clear()
        pair = [asyncio.ensure_future(batcher.submit("a", n)) for n in (1, 2)]
        await until(lambda: len(recorder.batches) == 1)
        pair[0].cancel()
        recorder.go.set()
        # The other request still gets its result.
        assert (await pair[1]).value == 4
        assert recorder.abandoned == 0

        recorder.go.clear()
        alone = asyncio.ensure_future(batcher.submit("a", 3))
        await until(lambda: len(recorder.batches) == 2)
        alone.cancel()
        await asyncio.gather(alone, return_exceptions=True)
        recorder.go.set()
        await until(lambda: recorder.abandoned == 1)
        # The model is then free for the next batch.
        assert (await batcher.submit("a", 4)).value == 8
        batcher.close()

    run(main())


def test_a_fault_belongs_to_its_own_batch() -> None:
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(Recorder(), batch_size=2, wait_s=0.02)
        bad = await asyncio.gather(batcher.submit("a", 13), batcher.submit("a", 1), return_exceptions=True)
        assert [str(error) for error in bad] == ["thirteen", "thirteen"]
        assert (await batcher.submit("a", 2)).value == 4
        batcher.check()
        batcher.close()

    run(main())


def test_a_model_that_fails_again_and_again_is_not_healthy() -> None:
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(Recorder(), batch_size=1)

        async def fail(times: int) -> None:
            for _ in range(times):
                with pytest.raises(ValueError, match="thirteen"):
                    await batcher.submit("a", 13)

        await fail(2)
        batcher.check()
        # A check that passes resets the failed ones before it.
        await batcher.submit("a", 1)
        await fail(2)
        batcher.check()
        await fail(1)
        # Ray Serve ends a process that failed several checks.
        for _ in range(3):
            with pytest.raises(RuntimeError, match="the last 3 batches failed"):
                batcher.check()
        await batcher.submit("a", 1)
        batcher.check()
        batcher.close()

    run(main())


@pytest.mark.parametrize("refusal", [bad_value("prompt", "no"), InputError("no"), Abandoned()])
def test_refusals_and_cancellations_say_nothing_about_the_model(refusal: Exception) -> None:
    async def main() -> None:
        def work(group: Any, payloads: list[int], on_step: Callable[[int, int], None]) -> list[int]:
            raise refusal

        batcher: Batcher[int, int] = Batcher(work, batch_size=1)
        for _ in range(5):
            with contextlib.suppress(TimeoutError, type(refusal)):
                await asyncio.wait_for(batcher.submit("a", 1), 0.05)
        batcher.check()
        batcher.close()

    run(main())


def test_a_batch_that_hangs_is_not_healthy_and_a_long_one_is(now: list[float]) -> None:
    async def main() -> None:
        step, listener = threading.Semaphore(0), Steps()

        def work(group: Any, payloads: list[int], on_step: Callable[[int, int], None]) -> list[int]:
            for done in (1, 2, 3):
                assert step.acquire(timeout=HANG_S)
                on_step(done, 3)
            return payloads

        batcher: Batcher[int, int] = Batcher(work, batch_size=1, max_silence_s=60.0)
        # Being idle for longer than that is healthy.
        now[0] += 1000
        batcher.check()
        task = asyncio.ensure_future(batcher.submit("a", 1, listener))
        await until(lambda: listener.told == [("queued", 0)])
        for done in (1, 2):
            now[0] += 50
            batcher.check()
            step.release()
            while ("step", done) not in listener.told:
                await asyncio.sleep(0.005)
        now[0] += 61
        for _ in range(3):
            with pytest.raises(RuntimeError, match="no sign for 61 s"):
                batcher.check()
        step.release()
        await task
        batcher.check()
        batcher.close()

    run(main())


def test_a_loop_that_ended_is_not_hidden_by_the_next_request() -> None:
    class Broken:
        def on_queued(self, position: int) -> None:
            if position == 0:
                raise KeyError("a listener")

        def on_step(self, done: int, total: int) -> None: ...

    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=1)
        recorder.go.clear()
        tasks = [asyncio.ensure_future(batcher.submit("a", n)) for n in range(2)]
        tasks.append(asyncio.ensure_future(batcher.submit("a", 2, Broken())))
        await until(lambda: len(recorder.batches) == 1)
        recorder.go.set()
        # It becomes first when the second one is taken.
        await until(lambda: batcher._task is not None and batcher._task.done())
        for _ in range(2):
            with pytest.raises(KeyError, match="a listener"):
                await batcher.submit("a", 3)
            with pytest.raises(KeyError, match="a listener"):
                batcher.check()
        for task in tasks:
            task.cancel()
        batcher.close()

    run(main())


def test_everybody_is_told_his_place_and_the_steps() -> None:
    async def main() -> None:
        recorder = Recorder()
        batcher: Batcher[int, int] = Batcher(recorder, batch_size=1)
        listeners = [Steps() for _ in range(3)]
        recorder.go.clear()
        tasks = [asyncio.ensure_future(batcher.submit("a", n, listener)) for n, listener in enumerate(listeners)]
        await until(lambda: len(recorder.batches) == 1)
        recorder.go.set()
        await asyncio.gather(*tasks)
        steps = [("step", 1), ("step", 2)]
        assert listeners[0].told == [("queued", 0), *steps]
        assert listeners[1].told == [("queued", 1), ("queued", 0), *steps]
        assert listeners[2].told == [("queued", 2), ("queued", 1), ("queued", 0), *steps]
        batcher.close()

    run(main())


def test_the_model_has_one_thread_of_its_own_and_the_loop_stays_free() -> None:
    async def main() -> None:
        threads = set()
        started, working, held = [], list[int](), list[bool]()
        go = threading.Event()

        def work(group: Any, payloads: list[int], on_step: Callable[[int, int], None]) -> list[int]:
            threads.add(threading.get_ident())
            working.extend(payloads)
            held.append(go.wait(HANG_S))
            return payloads

        model = ThreadPoolExecutor(1, initializer=lambda: started.append(threading.get_ident()))
        batcher: Batcher[int, int] = Batcher(work, batch_size=1, thread=model)
        tasks = [asyncio.ensure_future(batcher.submit("a", n)) for n in range(2)]
        await until(lambda: len(working) == 1)
        # The model is held until the loop has run several times. A blocked loop would never release it.
        for _ in range(20):
            await asyncio.sleep(0.005)
        assert not any(task.done() for task in tasks)
        go.set()
        await asyncio.gather(*tasks)
        assert [*threads] == started
        assert threading.get_ident() not in threads
        assert held == [True, True], "the event loop stood still while the model worked"
        batcher.close()

    run(main())


@pytest.mark.parametrize("number", [1, 3])
def test_results_that_do_not_fit_are_a_fault(number: int) -> None:
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(lambda group, payloads, on_step: [0] * number, batch_size=2, wait_s=0.02)
        with pytest.raises(AssertionError, match=f"{number} results for 2 payloads"):
            await asyncio.gather(batcher.submit("a", 1), batcher.submit("a", 2))
        batcher.close()

    run(main())


@pytest.mark.parametrize("kind", ["generator", "captioner"])
def test_a_replica_whose_model_hangs_for_a_request_s_time_is_not_healthy(kind: str, now: list[float]) -> None:
    served, begun, go = Served(limits=Limits(request_timeout_s=60)), threading.Event(), threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go.wait(HANG_S)

    served.fake_generator.generate = served.fake_captioner.caption = hang  # type: ignore[method-assign]

    async def main() -> None:
        replica = getattr(served, kind)
        ask = {
            "generator": lambda: served.generator.generate(wanted()),
            "captioner": lambda: served.captioner.caption({SIZE: np.zeros((SIZE, SIZE, 3), np.uint8)}, 5),
        }[kind]
        asking = asyncio.ensure_future(ask())
        await until(begun.is_set)
        now[0] += 60
        replica.check_health()
        now[0] += 1
        # The caller gives up after that time too. The thread stays blocked.
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        with pytest.raises(RuntimeError, match="no sign for"):
            replica.check_health()
        go.set()
        await served.close()

    run(main())
