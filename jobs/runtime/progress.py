"""Progress that a person can read: a bar on a terminal, a line every few seconds in a log. On stderr."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LINE_INTERVAL_S = 10.0
# The rate is that of the later half of the work so far, but of no more than this.
_WINDOW_S = 300.0
# What was seen for less time gives no rate.
_SETTLED_S = 3.0
_BAR_WIDTH = 40


class Report(Protocol):
    """Says how far the work is; a total of 0 says only that something is being done.

    `beside`: it is something beside the work that is counted, such as a validation between two steps.
    """

    def __call__(self, done: int, total: int, detail: str = "", beside: bool = False) -> None: ...


class Rate:
    """How much is done a second, in the later half of the time since the first progress, five minutes at most.

    So the slow first steps are soon forgotten. The rate leaves out the time between two reports of other work, such as
    a validation. The time that is left has its share of it.
    """

    def __init__(self) -> None:
        self.reports: deque[tuple[float, int]] = deque()
        """Times without other work, and what was done."""
        self.first_s: float | None = None
        """Time of the first progress."""
        self.other_s = 0.0
        """Seconds of other work since then."""
        self.last_other_s: float | None = None

    def add(self, now_s: float, done: int, beside: bool = False) -> None:
        """`done` in all, at the time `now_s`. `beside`: other work is being done."""
        if beside:
            self.other_s += 0.0 if self.last_other_s is None else now_s - self.last_other_s
            self.last_other_s = now_s
            return
        self.last_other_s = None
        if self.reports and done < self.reports[-1][1]:  # restarted from a checkpoint
            self.reports.clear()
            self.first_s = None
        if self.first_s is None and self.reports and done > self.reports[-1][1]:
            # Until then it was starting: what is measured begins here.
            self.reports.clear()
            self.first_s, self.other_s = now_s, 0.0
        working_s = now_s - self.other_s
        self.reports.append((working_s, done))
        if self.first_s is None:
            return
        since_s = working_s - min(_WINDOW_S, (working_s - self.first_s) / 2)
        while len(self.reports) > 2 and self.reports[1][0] <= since_s:
            self.reports.popleft()

    def per_s(self) -> float | None:
        """None where too little was seen yet."""
        if self.first_s is None:
            return None
        (then_s, before), (now_s, done) = self.reports[0], self.reports[-1]
        if done == before or now_s - self.first_s < _SETTLED_S:
            return None
        return (done - before) / (now_s - then_s)

    def left_s(self, remaining: int) -> float | None:
        """Seconds that `remaining` takes, with as much other work as before. None where too little was seen yet."""
        rate = self.per_s()
        if rate is None or self.first_s is None:
            return None
        return remaining / rate * (1 + self.other_s / (self.reports[-1][0] - self.first_s))


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, from an hour on as hours:minutes:seconds."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Work:
    """What is known of a work, and its numbers in words. Times are those of `time.monotonic`."""

    def __init__(self, what: str, unit: str, began_s: float) -> None:
        self.what, self.unit, self.began_s = what, unit, began_s
        self.done, self.total, self.detail = 0, 0, ""
        self.rate = Rate()

    def add(self, now_s: float, done: int, total: int, detail: str, beside: bool = False) -> None:
        self.done, self.total, self.detail = done, total, detail
        if total:
            self.rate.add(now_s, done, beside)

    def numbers(self, now_s: float) -> str:
        """How much of it is done, how fast, for how long, and how long it takes yet at that rate."""
        parts = [f"{self.done:,} of {self.total:,} {self.unit}"] if self.total else []
        rate = self.rate.per_s() if self.total else None
        if rate is not None:
            parts.append(f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2g} {self.unit}/s")
        parts.append(f"{clock(now_s - self.began_s)} elapsed")
        left_s = self.rate.left_s(self.total - self.done)
        if rate is not None and left_s:
            parts.append(f"{clock(left_s)} left")
        return ", ".join(parts)


class _Bar:
    """What a terminal shows of a work: what it is and does, and below it a bar with its numbers."""

    def __init__(self, work: Work, console: Console) -> None:
        self.work, self.console = work, console

    def __rich__(self) -> Group:
        work, numbers = self.work, self.work.numbers(time.monotonic())
        title = f"{work.what}: {work.detail}" if work.detail else work.what
        bar = ProgressBar(
            total=work.total or None,
            completed=work.done,
            # As much as the numbers leave of the line.
            width=max(4, min(_BAR_WIDTH, self.console.width - len(numbers) - 1)),
            pulse=not work.total,
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(bar, Text(numbers, no_wrap=True, overflow="ellipsis"))
        return Group(Text(title, no_wrap=True, overflow="ellipsis"), line)


@contextmanager
def progress(what: str, unit: str) -> Iterator[Report]:
    """`report(done, total, detail)` in `unit` of the work that `what` names."""
    console = Console(stderr=True)
    work = Work(what, unit, time.monotonic())
    if console.is_terminal:

        def show(done: int, total: int, detail: str = "", beside: bool = False) -> None:
            work.add(time.monotonic(), done, total, detail, beside)

        with Live(_Bar(work, console), console=console, refresh_per_second=4):
            yield show
            work.detail = ""
        return
    last_line, last_done, is_begun = work.began_s, -1, False

    def log(done: int, total: int, detail: str = "", beside: bool = False) -> None:
        nonlocal last_line, last_done, is_begun
        now = time.monotonic()
        work.add(now, done, total, detail, beside)
        finished = done == total and done != last_done and total > 0
        # What work begins with, such as the start of workers, may be all that is reported for a minute.
        begins, is_begun = bool(detail) and not is_begun, True
        if not finished and not begins and now - last_line < LINE_INTERVAL_S:
            return
        print(f"{what}: {work.numbers(now)}{', ' if detail else ''}{detail}", file=sys.stderr, flush=True)
        last_line, last_done = now, done

    yield log
