"""What is unfinished when the service ends, and what is said of it."""

from collections.abc import Iterable
from typing import TypedDict

# As many ids of requests and jobs are named.
_NUM_NAMED = 20


class Unfinished(TypedDict):
    """Ids of what a process that ends has still to do."""

    waited_for: list[str]
    """Requests in flight, and jobs at work whose storage outlives the service."""
    kept: list[str]
    """Jobs that the next start takes up again."""
    lost: list[str]
    """Jobs that end with the service."""


def nothing() -> Unfinished:
    return {"waited_for": [], "kept": [], "lost": []}


def joined(parts: Iterable[Unfinished]) -> Unfinished:
    """All of several processes, each id once: every process that answers requests names the jobs."""
    found = nothing()
    for part in parts:
        for whole, more in (
            (found["waited_for"], part["waited_for"]),
            (found["kept"], part["kept"]),
            (found["lost"], part["lost"]),
        ):
            whole += [each for each in more if each not in whole]
    return found


def verdict(left: Unfinished | None) -> tuple[str, int]:
    """The last line of a service that was told to end, and its exit code: 0 if nothing was lost.

    `left`: what was unfinished when the wait for it ended; None if no process said.
    """
    if left is None:
        return "serve: ended; it is not known whether every request was answered", 1
    kept, lost = left["kept"], left["lost"]
    late = [each for each in left["waited_for"] if each not in kept]
    told = [f"{len(late)} not finished in time: {_named(late)}"] if late else []
    if lost:
        is_lost, them = ("job is", "it") if len(lost) == 1 else ("jobs are", "them")
        told.append(f"{len(lost)} unfinished {is_lost} lost (storage=URI would keep {them}): {_named(lost)}")
    dropped = bool(told)
    if kept:
        go_on = "job goes on" if len(kept) == 1 else "jobs go on"
        told.append(f"{len(kept)} unfinished {go_on} at the next start with the same storage=: {_named(kept)}")
    ended = "serve: ended" if dropped else "serve: ended, every request answered"
    return "; ".join([ended, *told]), int(dropped)


def _named(ids: list[str]) -> str:
    more = "" if len(ids) <= _NUM_NAMED else f" and {len(ids) - _NUM_NAMED} more"
    # A caller may choose the id of its request.
    return f"{', '.join(each if each.isprintable() else ascii(each) for each in ids[:_NUM_NAMED])}{more}"
