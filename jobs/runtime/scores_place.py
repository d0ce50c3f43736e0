"""Where the scores of a run are written."""

import re

from jobs.runtime.source import output_storage
from mmcore.errors import InputError
from mmcore.storage import Storage

DEFAULT_DATASET = "flickr8k"
# A bucket cannot be the `runs` itself: s3://runs/recipe/name names no storage.
RUN_URI = re.compile(r"(?P<storage>s3://[^/]+.*|(?!s3://).+)/runs/(?P<recipe>[^/]+)/(?P<name>[^/]+)")


def find_scores_place(run_uri: str) -> tuple[Storage, str]:
    """STORAGE/runs/RECIPE/NAME -> (STORAGE/scores/RECIPE, NAME.json); InputError where that is no run."""
    # Storage makes a relative path absolute, so `runs/recipe/name` has a storage before it as well.
    run_storage = output_storage(run_uri.rstrip("/"), "--run")
    match = RUN_URI.fullmatch(run_storage.uri)
    if match is None:
        raise InputError(f"--run {run_uri}: expected STORAGE/runs/RECIPE/NAME")
    if not (run_storage.exists("recipe.json") or (run_storage / "model").exists("recipe.json")):
        raise InputError(f"--run {run_uri}: no run there (no recipe.json)")
    return Storage(match["storage"]) / "scores" / match["recipe"], f"{match['name']}.json"
