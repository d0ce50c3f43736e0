"""Clients that keep a service busy during an event, or that send more requests than it can handle."""

import asyncio
import math
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import httpx
from real_service import BATCH_SIZE, LIMITS, STEP_S
from serving import AUTHORIZED, GENERATIONS, HANG_S, run

# Enough work that the model is the bottleneck: two images a second. For a faster model, ten times as many requests as
# it can handle would need more than two cores for any service.
OVERLOAD_STEPS = 40
# Time of a batch, measured with ten times too many requests from the same cores: one second on an idle machine.
MAX_REFUSAL_BATCHES = 0.5


class Load:
    """Clients that send requests again and again. Every answer is recorded."""

    def __init__(
        self, connect: Callable[[], httpx.Client], num_clients: int, ask: Callable[[httpx.Client], httpx.Response]
    ) -> None:
        self.answers: list[tuple[float, float, int, str]] = []
        """Per request: the times of request and answer, the status (0: no answer), and the answer's text."""
        self._stop = threading.Event()

        def work() -> None:
            with connect() as client:
                while not self._stop.is_set():
                    began = time.monotonic()
                    try:
                        response = ask(client)
                        answer = response.status_code, response.text
                    except httpx.HTTPError as error:
                        answer = 0, f"{type(error).__name__}: {error}"
                    self.answers.append((began, time.monotonic(), *answer))

        self._threads = [threading.Thread(target=work) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_S)

    def wait_for(self, number: int) -> None:
        """Wait for `number` more good answers."""
        wanted = self.statuses()[200] + number
        deadline = time.monotonic() + HANG_S
        while self.statuses()[200] < wanted:
            assert time.monotonic() < deadline, self.statuses()
            time.sleep(0.02)

    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status, _ in list(self.answers))

    def told(self, what: str, killed_at: float) -> str:
        """The figures of a kill: answers, and the longest wait of any later request for its answer."""
        gap = min(ended for began, ended, status, _ in self.answers if status == 200 and began > killed_at) - killed_at
        longest = max(ended - began for began, ended, status, _ in self.answers if status == 200)
        return f"{what}: {dict(self.statuses())}, answers again after {gap:.2f} s, the longest took {longest:.2f} s"


class Measured(Protocol):
    """A service and its metrics."""

    url: str

    def metric(self, name: str) -> float: ...


def model_seconds(service: Measured) -> tuple[float, float]:
    """Of the generator's model: seconds summed over the images of all batches, and the number of images."""
    total, count = (
        service.metric(f'mmcore_stage_seconds_{what}{{model="shapes",stage="model"}}') for what in ("sum", "count")
    )
    return total, count


def overload(service: Measured) -> list[str]:
    """A steady stream of ten times as many requests as the model can handle. Returns what took longer than allowed."""
    seconds, rate = 8.0, 10 * BATCH_SIZE / (OVERLOAD_STEPS * STEP_S)
    answers: list[tuple[int, float, Any]] = []

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        await asyncio.sleep(number / rate)
        began = time.monotonic()
        body = {"prompt": f"p{number}", "seed": number, "num_inference_steps": OVERLOAD_STEPS}
        response = await client.post(GENERATIONS, json=body)
        answers.append((response.status_code, time.monotonic() - began, response))

    async def main() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, headers=AUTHORIZED, limits=limits, timeout=HANG_S) as client:
            await asyncio.gather(*(ask(client, number) for number in range(int(rate * seconds))))

    before = model_seconds(service)
    run(main())
    after = model_seconds(service)
    statuses = Counter(status for status, _, _ in answers)
    # If this client itself is slow, refusals are not expected.
    assert {200} <= set(statuses) <= {200, 429}, statuses
    for status, _, response in answers:
        if status == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) >= 1
    accepted = sorted(taken for status, taken, _ in answers if status == 200)
    refused = sorted(taken for status, taken, _ in answers if status == 429) or [math.inf]
    batch_s = (after[0] - before[0]) / (after[1] - before[1])
    p99, refusal_p99 = accepted[int(len(accepted) * 0.99)], refused[int(len(refused) * 0.99)]
    # The whole queue ahead, the current batch, and the transfer in both directions.
    bound = (LIMITS.max_queue / BATCH_SIZE + 2) * batch_s
    told = (
        f"overload: {dict(statuses)}, accepted p50 {statistics.median(accepted):.2f} s, p99 {p99:.2f} s, "
        f"refused p50 {statistics.median(refused):.3f} s, p99 {refusal_p99:.3f} s, batch {batch_s:.2f} s, {bound=:.2f}"
    )
    print(told)
    # The model must not idle while requests wait, and refusals must come at once.
    is_busy = len(accepted) > BATCH_SIZE / batch_s * seconds * 0.7
    return [] if is_busy and p99 < bound and refusal_p99 < MAX_REFUSAL_BATCHES * batch_s else [told]
