"""The folder of a run: begun anew, gone on with, or refused."""

import contextlib
import json
from typing import Any

from jobs.runtime.job import Job
from jobs.runtime.source import source_commit
from mmcore.errors import InputError
from mmcore.recipe import difference, recipe_from_json, recipe_to_json
from mmcore.storage import Storage
from mmcore.training import check_batch

_SNAPSHOT = "checkpoint_manager_snapshot.json"
_PLACES = ("encoder", "text_encoder", "tokenizer", "vqvae", "perceptual", "vgg16", "lpips_heads")


def open_run(job: Job, facts: dict[str, Any]) -> None:
    """Create the run folder, or check that the unfinished run there is this one.

    `facts`: what beside the recipe decides the result, such as the dataset's fingerprint.
    Raises InputError for a finished run and for an unfinished one of other settings.
    """
    run, again = job.run, "give another --name, or --fresh to start anew"
    if job.options.fresh:
        run.delete_tree(first=["_SUCCESS", _SNAPSHOT, "recipe.json"])
    if run.exists("_SUCCESS"):
        raise InputError(f"{run} is finished; {again}")
    mine = {"recipe": job.recipe_name, "variant": job.variant, "settings": recipe_to_json(job.recipe), **facts}
    data = json.dumps({**mine, "commit": source_commit()}, indent=1, ensure_ascii=False).encode()
    if not run.create("recipe.json", data):
        there = json.loads(run.read("recipe.json"))
        there.pop("commit")
        mine.pop("variant"), there.pop("variant")
        with contextlib.suppress(InputError):  # of fields that are no more; `difference` names them
            # A field that is younger than the run has its default, which is how the run was trained.
            there["settings"] = recipe_to_json(recipe_from_json(type(job.recipe), there["settings"], run.uri))
        differences = difference(_without_places(json.loads(json.dumps(mine))), _without_places(there))
        if differences:
            raise InputError(f"{run} holds an unfinished run of other settings: {'; '.join(differences[:5])}; {again}")
        print(f"going on with the unfinished run {run}", flush=True)


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    """Without the folders of pretrained parts, which `facts` know by their fingerprints wherever they lie today."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in _PLACES
    }


def check_new_run(job: Job) -> None:
    """Refuse a finished run before any other work is done for it."""
    check_batch(job.recipe.train, job.options.num_workers)
    if not job.options.fresh and job.run.exists("_SUCCESS"):
        raise InputError(f"{job.run} is finished; give another --name, or --fresh to start anew")


def remove_unfinished_uploads(run: Storage) -> None:
    """Remove checkpoint folders that Ray Train's snapshot does not name: uploads that failed or were killed."""
    try:
        snapshot = run.read(_SNAPSHOT).decode()
    except FileNotFoundError:
        snapshot = ""
    for folder in run.folders():
        if folder.startswith("checkpoint_") and folder not in snapshot:
            (run / folder).delete_tree()
    run.remove_temporary()
