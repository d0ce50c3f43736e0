"""Common code of the benchmarks: the clock, interleaved pairs, medians, and one JSON object on stdout."""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jobs.runtime.source import source_commit
from mmcore.device import device_name
from mmcore.errors import InputError
from mmcore.recipe import TrainSettings
from mmcore.rows import Rows
from mmcore.training import RunHooks, Training

MIN_PAIRS = 5


def clock() -> float:
    """The time in seconds after all work of the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def say(line: str) -> None:
    """Print progress to stderr, as stdout is for the result only."""
    print(line, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, minimum, maximum and all values."""
    return {
        "median": round(statistics.median(values), 5),
        "min": round(min(values), 5),
        "max": round(max(values), 5),
        "all": [round(value, 5) for value in values],
    }


def compare(unit: str, figures: dict[str, list[float]]) -> dict[str, Any]:
    """The spread of two series measured in pairs, and of the ratios first / second within the pairs."""
    first, second = figures.values()
    ratios = [one / other for one, other in zip(first, second, strict=True)]
    return {"unit": unit, "ratio": spread(ratios)} | {name: spread(values) for name, values in figures.items()}


def interleaved(unit: str, ways: dict[str, Callable[[], float]], num_pairs: int) -> dict[str, Any]:
    """`compare` two functions that each return one figure per call, called in turn.

    The order alternates between pairs, as one run can affect the machine for the next, for example by heat.
    """
    names = list(ways)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(num_pairs):
        for name in names if pair % 2 == 0 else names[::-1]:
            figures[name].append(ways[name]())
            say(f"pair {pair + 1} of {num_pairs}: {name} {figures[name][-1]:.5g} {unit}")
    return compare(unit, figures)


class _AllPairsTaken(Exception):
    """Ends a measured run early, before its last validation and checkpoint, which can have gigabytes."""


def training_in_turn(
    name: str,
    unit: str,
    training: tuple[nn.Module, Rows, TrainSettings],
    report: Callable[[], float],
    *,
    pairs: int,
    our_steps: int,
    warmup_steps: int,
    items_per_step: int,
) -> dict[str, Any]:
    """`compare` our training loop with the report's. The report's runs after each block of `our_steps` of one run.

    Args:
        training: model, rows and settings for `Training`; the number of steps is set here.
        report: returns one figure of the report's loop per call.
        items_per_step: number of items, as counted by `unit`, in one of our steps.
    Returns: the figures and `our_precision`. Raises InputError without warm-up steps.
    """
    if warmup_steps < 1:
        raise InputError("--warmup-steps 0: the first block is timed from the end of a step; give at least 1")
    model, rows, settings = training
    num_steps = warmup_steps + pairs * our_steps
    settings = dataclasses.replace(
        settings,
        num_epochs=num_steps,
        max_steps=num_steps,
        validate_every_epochs=num_steps,
        checkpoint_every_steps=num_steps,
    )
    figures: dict[str, list[float]] = {"ours": [], "report": []}
    started = 0.0

    def take_turns(values: dict[str, Any]) -> None:
        nonlocal started
        done = values["step"] - warmup_steps
        if done < 0 or done % our_steps:
            return
        if done:
            figures["ours"].append(our_steps * items_per_step / (clock() - started))
            figures["report"].append(report())
            rates = ", ".join(f"{way} {rate[-1]:.5g}" for way, rate in figures.items())
            say(f"{name}, pair {len(figures['ours'])} of {pairs}: {rates} {unit}")
        if len(figures["ours"]) == pairs:
            raise _AllPairsTaken
        started = clock()

    with tempfile.TemporaryDirectory() as folder:
        run = Training(model, rows, settings, RunHooks(progress=take_turns), workdir=Path(folder))
        with contextlib.suppress(_AllPairsTaken):
            run.run()
    return compare(unit, figures) | {"our_precision": run.precision}


def ratio_with_encoding(figures: dict[str, Any], encode_seconds: float) -> float:
    """The ratio of the medians if each of our items also takes `encode_seconds`, its share of the encoding."""
    return round(1 / (1 / figures["ours"]["median"] + encode_seconds) / figures["report"]["median"], 3)


def verdict(name: str, met: bool, limit: float, smoke: bool) -> dict[str, Any]:
    """The limit and whether it is met; None with tiny sizes."""
    return {name: limit, f"{name}_met": None if smoke else met}


def publish(bench: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Print one JSON object: device, versions, settings and figures of a measurement.

    Other output of the measured code goes to stderr. If `load_before` exceeds the number of cores, the machine was in
    use and the figures are inaccurate. Raises InputError for too few pairs unless `smoke` is set.
    """
    if settings.get("pairs", MIN_PAIRS) < MIN_PAIRS and not settings["smoke"]:
        raise InputError(f"--pairs {settings['pairs']}: a median needs at least {MIN_PAIRS}")
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
