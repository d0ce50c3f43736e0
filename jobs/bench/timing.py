"""What the measurements share: the clock, pairs taken in turn, their medians, and one JSON object on stdout."""

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from jobs.trainer import source_commit
from mmcore.device import device_name

MIN_PAIRS = 5


def clock() -> float:
    """Seconds, with all work of the device done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def say(line: str) -> None:
    """Progress, on stderr: stdout holds the result alone."""
    print(line, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes and every value."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "all": [round(value, 5) for value in values],
    }


def compare(unit: str, figures: dict[str, list[float]]) -> dict[str, Any]:
    """Two series, taken in pairs: the spread of each, and of the ratios first / second within a pair."""
    first, second = figures.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return {"unit": unit, "ratio": spread(ratios)} | {name: spread(values) for name, values in figures.items()}


def interleaved(unit: str, ways: dict[str, Callable[[], float]], num_pairs: int) -> dict[str, Any]:
    """`compare` of two ways, each giving one figure a call, called in turn.

    The order changes from pair to pair, so that neither always runs on the machine that the other warmed or tired.
    """
    names = list(ways)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(num_pairs):
        for name in names if pair % 2 == 0 else names[::-1]:
            figures[name].append(ways[name]())
            say(f"pair {pair + 1} of {num_pairs}: {name} {figures[name][-1]:.5g} {unit}")
    return compare(unit, figures)


def verdict(name: str, met: bool, limit: float, smoke: bool) -> dict[str, Any]:
    """The limit and whether it is met; tiny sizes show nothing about it."""
    return {name: limit, f"{name}_met": None if smoke else met}


def publish(bench: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Print the one JSON object of a measurement: where and how it was taken, and its figures.

    Whatever else the measured code prints goes to stderr. `load_before` over the number of cores tells that the
    machine was shared, and the figures are rough.
    """
    facts = {
        "bench": bench,
        "commit": source_commit(),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "settings": settings,
    }
    with contextlib.redirect_stdout(sys.stderr):
        figures = measure()
    print(json.dumps(facts | figures, indent=1))
