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
    """Says how far the work is."""

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
                bars.update(task, completed=done, total=total, detail=detail)

            yield show
        return
    started = last_line = time.monotonic()
    last_done, first_done = -1, None

    def log(done: int, total: int, detail: str = "") -> None:
        nonlocal last_line, last_done, first_done
        first_done = done if first_done is None else first_done
        now = time.monotonic()
        if done != last_done and (now - last_line >= LINE_INTERVAL_S or done == total):
            rate = (done - first_done) / (now - started)
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            text = f"{what}: {done:,} of {total:,} {unit}, {now - started:.0f} s{left}{', ' if detail else ''}{detail}"
            print(text, file=sys.stderr, flush=True)
            last_line, last_done = now, done

    yield log
