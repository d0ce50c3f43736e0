"""What the measurements share: the clock, pairs taken in turn, their medians, and one JSON object on stdout."""

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


class _AllPairsTaken(Exception):
    """Ends a run that is measured: its last validation and checkpoint, gigabytes of a large model, are not."""


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
    """`compare` of our training loop with the report's way: one run of ours goes through its steps, and after each
    block of `our_steps` the report's way takes its turn, off our clock.

    `training`: what `Training` takes, here with as many steps as are measured; `report` gives one figure a call;
    `items_per_step` of ours are what `unit` counts. Also returned: `our_precision`.
    """
    if warmup_steps < 1:
        raise InputError("--warmup-steps 0: the first block begins where a step ends; give at least 1")
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
    """The ratio of the medians where each item of ours also takes `encode_seconds`, its share of the encoding."""
    return round(1 / (1 / figures["ours"]["median"] + encode_seconds) / figures["report"]["median"], 3)


def verdict(name: str, met: bool, limit: float, smoke: bool) -> dict[str, Any]:
    """The limit and whether it is met; tiny sizes show nothing about it."""
    return {name: limit, f"{name}_met": None if smoke else met}


def publish(bench: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    """Print the one JSON object of a measurement: where and how it was taken, and its figures.

    Whatever else the measured code prints goes to stderr. `load_before` over the number of cores tells that the
    machine was shared, and the figures are rough. Raises InputError for too few pairs, unless `smoke` says that nothing
    is measured.
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
