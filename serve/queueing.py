"""How many images may be in the service at once. A request past that is refused with 429 before its work begins."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar

from serve.errors import ApiError

# The caller of a request, in the task that handles it. Empty for a service with one key, which shares with no other.
CALLER: ContextVar[str] = ContextVar("caller", default="")
# The weight of a new request in the average time that a request takes.
_SMOOTHING = 0.2
_MAX_RETRY_AFTER_S = 60.0


class Admission:
    """The images in the service, by model: those that wait, are in work, or are on their way.

    This bound lies before all queues. Ray Serve's router would let requests that it holds back pass two at a time, and
    batches would shrink to two. Each replica therefore takes more than is admitted here.
    """

    def __init__(
        self,
        limit: int,
        on_change: Callable[[str, int], None] = lambda model, held: None,
        share: float = 1.0,
    ) -> None:
        """`share`: the part of the places that one caller may have. A single request may exceed it."""
        self.limit = limit
        self.held: Counter[str] = Counter()
        self._share = share
        self._held_by: Counter[tuple[str, str]] = Counter()
        self._on_change = on_change
        self._average_s: dict[str, float] = {}

    @contextlib.contextmanager
    def enter(self, costs: Mapping[str, int]) -> Iterator[None]:
        """Hold `costs[model]` places of each model. Raises ApiError 429 where a model has too few free places."""
        caller = CALLER.get()
        for model, cost in costs.items():
            before = self._held_by[model, caller]
            if caller and before and before + cost > self._share * self.limit:
                raise ApiError(
                    429,
                    f"this key has {before} images waiting or in work at the model {model!r}; one key may have "
                    f"{self._share * self.limit:g}; try again",
                    code="queue_full",
                    retry_after_s=self._retry_after_s(model, cost),
                )
            if self.held[model] + cost > self.limit:
                raise ApiError(
                    429,
                    f"the model {model!r} is busy: {self.held[model]} images are waiting or in work, and at most "
                    f"{self.limit} may be; try again",
                    code="queue_full",
                    retry_after_s=self._retry_after_s(model, cost),
                )
        self._change(costs, caller, 1)
        entered_at = time.monotonic()
        try:
            yield
        finally:
            self._change(costs, caller, -1)
            seconds = time.monotonic() - entered_at
            for model in costs:
                average_s = self._average_s.get(model, seconds)
                self._average_s[model] = average_s + _SMOOTHING * (seconds - average_s)

    def _change(self, costs: Mapping[str, int], caller: str, sign: int) -> None:
        for model, cost in costs.items():
            self.held[model] += sign * cost
            self._held_by[model, caller] += sign * cost
            self._on_change(model, self.held[model])

    def _retry_after_s(self, model: str, cost: int) -> float:
        """By Little's law: if an image takes W seconds, a full queue frees limit / W places a second."""
        wait_s = cost * self._average_s.get(model, 1.0) / self.limit
        return min(_MAX_RETRY_AFTER_S, max(1.0, wait_s))
