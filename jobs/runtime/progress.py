"""Progress that a person can read: a bar on a terminal, a line every few seconds in a log. On stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_S = 10.0


class Report(Protocol):
    """Says how far the work is; a total of 0 says only that something is being done."""

    def __call__(self, done: int, total: int, detail: str = "") -> None: ...


@contextmanager
def progress(what: str, unit: str) -> Iterator[Report]:
    """`report(done, total, detail)` in `unit` of the work that `what` names."""
    console = Console(stderr=True)
    if console.is_terminal:
        detail_column = TextColumn("{task.fields[detail]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), detail_column)
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bars:
            task = bars.add_task(what, total=None, detail="")

            def show(done: int, total: int, detail: str = "") -> None:
                bars.update(task, completed=done, total=total or None, detail=detail)

            yield show
        return
    started = last_line = time.monotonic()
    last_done = -1
    # How much was done at first sight, and when: what is left is reckoned from there, without the start-up.
    first: tuple[int, float] | None = None

    def log(done: int, total: int, detail: str = "") -> None:
        nonlocal last_line, last_done, first
        now = time.monotonic()
        if total and first is None:
            first = done, now
        finished = done == total and done != last_done and total > 0
        if not finished and now - last_line < LINE_INTERVAL_S:
            return
        parts = [f"{now - started:.0f} s"]
        if first is not None and first[0] < done < total:
            parts.append(f"{(total - done) * (now - first[1]) / (done - first[0]):.0f} s left")
        if detail:
            parts.append(detail)
        count = f"{done:,} of {total:,} {unit}, " if total else ""
        print(f"{what}: {count}{', '.join(parts)}", file=sys.stderr, flush=True)
        last_line, last_done = now, done

    yield log
