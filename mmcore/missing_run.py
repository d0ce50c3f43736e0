"""Says which finished runs there are where a run is named that does not exist."""

import difflib
import re

from mmcore.storage import Storage

_MAX_LISTED = 10


def no_such_run(run: Storage) -> str:
    """That `run` does not exist, the name that was probably meant, and the finished runs beside it."""
    finished = finished_beside(run)
    near = difflib.get_close_matches(run.uri.rsplit("/", 1)[1], finished, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"no such run; {meant}{to_name(run, finished)}"


def to_name(run: Storage, finished: list[str]) -> str:
    """Which run to name instead of `run`: one of those that are `finished` beside it."""
    if not finished:
        return "name a finished run, STORAGE/runs/RECIPE/NAME"
    more = f" and {len(finished) - _MAX_LISTED:,} more" if len(finished) > _MAX_LISTED else ""
    return f"name a finished run, {run.parent} has: {', '.join(finished[:_MAX_LISTED])}{more}"


def finished_beside(run: Storage) -> list[str]:
    """The names of the finished runs in the folder of `run`, if it has the form STORAGE/runs/RECIPE/NAME."""
    if not re.search(r"/runs/[^/]+/[^/]+$", run.uri):
        return []
    return [name for name in run.parent.folders() if (run.parent / name / "model").exists("recipe.json")]
