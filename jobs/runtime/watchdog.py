"""What a job says when nothing moves: what it waits for, and its end after a time that the user gave."""

import contextlib
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

import ray
from ray.util.placement_group import placement_group_table

from jobs.runtime import ray_private
from jobs.runtime.commandline import in_one_line, say
from mmcore.errors import InputError

FIRST_REPORT_S = 45.0
"""A stall is named after this time without progress; with `QUERY_TIMEOUT_S` on top it stays below 60 s."""
REPORT_INTERVAL_S = 60.0
QUERY_TIMEOUT_S = 10.0
ALL_PLACED = (
    "the workers have what they asked for, so the work takes long or the machine is busy; nothing needs to be done"
)
"""What `describe_waiting` says where nothing waits for a place to run."""
_T = TypeVar("_T")


class Watchdog:
    """Says what a job waits for, or that it is slow, when nothing moves; ends it after a `stall_timeout_s` if given.

    ::

        with Watchdog("training", settings.stall_timeout_s) as watchdog:
            for batch in batches:
                watchdog.beat()

    Without a beat for `report_after_s` a thread prints one line to stderr, and again every minute until the next beat.
    The line names the pending placement groups, actors and tasks, their requests, and the resources of the cluster.
    Where nothing is pending it says `ALL_PLACED`.

    After `stall_timeout_s` without a beat it prints the line a last time and ends the process with exit code 1. It does
    so even if the main thread is blocked inside Ray. None (the default) waits for ever, as an autoscaler may take
    minutes.
    """

    def __init__(self, what: str, stall_timeout_s: float | None = None, report_after_s: float = FIRST_REPORT_S) -> None:
        if stall_timeout_s is not None and stall_timeout_s <= 0:
            raise InputError(f"--stall-timeout {stall_timeout_s:g}: must be more than 0 seconds")
        self.what = what
        self.stall_timeout_s = stall_timeout_s
        self.report_after_s = report_after_s
        self.usual_s = 0.0
        """The longest time between beats that was no stall: three times it and less is reported in calmer words."""
        self._last_beat = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """There was progress. Cheap enough to be called for every batch, from any thread."""
        self._last_beat = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def _watch(self) -> None:
        watched_beat, next_report_s = self._last_beat, self.report_after_s
        while True:
            if watched_beat != self._last_beat:
                watched_beat, next_report_s = self._last_beat, self.report_after_s
            next_event_s = min(next_report_s, self.stall_timeout_s or next_report_s)
            wait_s = watched_beat + next_event_s - time.monotonic()
            # No longer than `report_after_s`: a beat after a report is seen in time for the next stall.
            if self._stop.wait(max(0.0, min(wait_s, self.report_after_s))):
                return
            if watched_beat != self._last_beat or wait_s > self.report_after_s:
                continue
            waiting = _bounded(_describe_or_error, QUERY_TIMEOUT_S, "the cluster's head does not answer")
            # The answer took time: the job may have gone on or finished meanwhile.
            if self._stop.is_set() or watched_beat != self._last_beat:
                continue
            idle_s = time.monotonic() - watched_beat
            is_usual = idle_s < 3 * self.usual_s
            before = f" (earlier waits took up to {self.usual_s:.0f} s)" if is_usual else ""
            line = f"{self.what}: no progress for {idle_s:.0f} s{before}: {waiting}"
            if self.stall_timeout_s is not None and idle_s >= self.stall_timeout_s:
                end_process(f"error: {line} (--stall-timeout {self.stall_timeout_s:g})")
            # What is placed and runs is slow at worst.
            unusual = "slow" if waiting == ALL_PLACED else "stalled"
            say(f"{'waiting' if is_usual else unusual}: {line}")
            next_report_s = idle_s + REPORT_INTERVAL_S


def _describe_or_error() -> str:
    try:
        return describe_waiting()
    except Exception as error:  # whatever it is, the report and the time-out must come
        return f"the cluster's state cannot be read ({type(error).__name__}: {in_one_line(error)})"


def describe_waiting() -> str:
    """What the cluster cannot place now, in one line: demands, then totals, then the resources that lack."""
    if not ray.is_initialized():
        return "not connected to a cluster"
    # Ray Train takes its placement group back and asks again once a minute: look twice before saying nothing.
    for attempt in range(3):
        if attempt:
            time.sleep(1)
        state = ray_private.scheduling_state()
        demands = _pending_demands(state)
        if demands:
            break
    else:
        return ALL_PLACED
    nodes = [
        (_real_resources(node.total_resources), _real_resources(node.available_resources))
        for node in state.node_states
        if ray_private.is_alive(node)
    ]
    totals, frees = [total for total, _ in nodes], [free for _, free in nodes]
    asked = {name for bundles, _ in demands for bundle in bundles for name in bundle}
    total, free = _summed(totals), _summed(frees)
    has = ", ".join(
        f"{name} {_quantity(name, total[name])} ({_quantity(name, free[name])} free)"
        for name in sorted({"CPU", "GPU"} | asked)
    )
    never = sorted({name for bundles, _ in demands for name in _lacking(bundles, totals)})
    busy = sorted({name for bundles, _ in demands for name in _lacking(bundles, frees)} - set(never))
    line = f"waiting for {'; '.join(text for _, text in demands)}: the cluster has {has}"
    if never:
        line += f"; missing: {', '.join(never)}"
    if busy:
        line += f"; all in use: {', '.join(busy)}"
    return line


def _pending_demands(state: Any) -> list[tuple[list[Counter[str]], str]]:
    """(bundles that must be placed at once, their description) for all that waits in the scheduling state."""
    demands: list[tuple[list[Counter[str]], str]] = []
    names = {group_id: group["name"] for group_id, group in placement_group_table().items() if group["name"]}
    for gang in state.pending_gang_resource_requests:
        bundles = [_real_resources(request.resources_bundle) for request in gang.requests]
        name = names.get(gang.details.partition(":")[0])
        kinds = Counter(_bundle_text(bundle) for bundle in bundles)
        text = " + ".join(_times(kind, count) for kind, count in kinds.items())
        demands.append((bundles, f"a placement group{f' {name!r}' if name else ''} of {text}"))
    actors = Counter(name for name, state in ray_private.actor_states() if state in ("PENDING_CREATION", "RESTARTING"))
    for pending in state.pending_resource_requests:
        asked = pending.request.resources_bundle
        bundle = _real_resources(asked)
        # Inside a placement group the demand is for its `CPU_group_ab12`: what the cluster has is no help.
        inside = Counter({name.partition("_group_")[0]: asked[name] for name in asked if "_group_" in name})
        del inside["bundle"]
        text = _times(_bundle_text(bundle or inside), pending.count)
        demands.append(([bundle], f"{text} (tasks or actors{' inside a full placement group' * bool(inside)})"))
    if actors and demands:
        listed = ", ".join(_times(name, count) for name, count in sorted(actors.items()))
        demands[-1] = (demands[-1][0], f"{demands[-1][1]}; pending actors: {listed}")
    return demands


def _real_resources(resources: Mapping[str, float]) -> Counter[str]:
    """Without what Ray derives from them: `node:10.0.0.1`, and `CPU_group_ab12` of a placement group, which
    counts CPUs a second time."""
    return Counter(
        {name: amount for name, amount in resources.items() if not name.startswith("node:") and "_group_" not in name}  # type: ignore[arg-type]
    )


def _summed(bundles: list[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return total


def _lacking(bundles: list[Counter[str]], nodes: list[Counter[str]]) -> set[str]:
    """The resources of which all nodes together, or the largest node for one bundle, have too little."""
    asked, had = _summed(bundles), _summed(nodes)
    return {
        name
        for name in asked
        if asked[name] > had[name]
        or max(bundle[name] for bundle in bundles) > max((node[name] for node in nodes), default=0)
    }


def _bundle_text(bundle: Counter[str]) -> str:
    return "{" + ", ".join(f"{name}: {_quantity(name, amount)}" for name, amount in sorted(bundle.items())) + "}"


def _quantity(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if name in ("memory", "object_store_memory") else f"{amount:g}"


def _times(text: str, count: int) -> str:
    return text if count == 1 else f"{text} x {count}"


def _bounded(call: Callable[[], _T], timeout_s: float, instead: _T) -> _T:
    """`call()` in a thread of its own, or `instead` when that has not returned in time."""
    result: list[_T] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0] if result else instead


def end_process(line: str) -> None:
    """Print the line and exit with code 1 from any thread, whatever the main thread is blocked in.

    Without `ray.shutdown()`, which makes a `ray.get` in the main thread raise SystemExit(0): a stalled job
    would have succeeded. Ray frees what the job holds when its driver is gone, and a local Ray's reaper ends
    its processes; only the folder with their logs stays.
    """
    say(line)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job alive
            stream.flush()
    os._exit(1)
