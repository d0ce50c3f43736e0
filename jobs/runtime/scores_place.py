"""Where the scores of a run lie: ``STORAGE/scores/RECIPE/NAME.json`` for ``STORAGE/runs/RECIPE/NAME``."""

import re

from jobs.runtime.source import output_storage
from mmcore.errors import InputError
from mmcore.missing_run import no_such_run
from mmcore.storage import Storage

DEFAULT_DATASET = "flickr8k"
# A bucket cannot be the `runs` itself: s3://runs/recipe/name names no storage.
_RUN_URI = re.compile(r"(?P<storage>s3://[^/]+.*|(?!s3://).+)/runs/(?P<recipe>[^/]+)/(?P<name>[^/]+)")


def scores_place(run: Storage) -> tuple[Storage, str] | None:
    """STORAGE/runs/RECIPE/NAME -> (STORAGE/scores/RECIPE, NAME.json); None for another form of URI."""
    match = _RUN_URI.fullmatch(run.uri)
    return match and (Storage(match["storage"]) / "scores" / match["recipe"], f"{match['name']}.json")


def find_scores_place(run_uri: str) -> tuple[Storage, str]:
    """`scores_place` of a run that is there. Raises InputError where none is."""
    # Storage makes a relative path absolute, so `runs/recipe/name` has a storage before it as well.
    run = output_storage(run_uri.rstrip("/"), "--run")
    place = scores_place(run)
    if place is None:
        raise InputError(f"--run {run_uri}: expected STORAGE/runs/RECIPE/NAME")
    if not (run.exists("recipe.json") or (run / "model").exists("recipe.json")):
        raise InputError(f"--run {run_uri}: {no_such_run(run)}")
    return place
