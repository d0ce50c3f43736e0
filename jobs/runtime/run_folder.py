"""The folder of a run: begun anew, gone on with, or refused."""

import dataclasses
import json
from collections.abc import Set
from typing import Any

from jobs.runtime.job import Job
from jobs.runtime.source import source_commit
from mmcore.errors import InputError
from mmcore.recipe import difference
from mmcore.run_files import RunFile, read_begun, write_begun
from mmcore.storage import Storage
from mmcore.training_plan import check_batch

_SNAPSHOT = "checkpoint_manager_snapshot.json"
_AGAIN = "give another --name, or --fresh to start anew"
_PLACES = (
    *("encoder", "text_encoder", "language_model", "tokenizer", "vqvae", "image_tokenizer"),
    *("perceptual", "vgg16", "lpips_heads"),
)


def open_run(job: Job[Any], facts: Any) -> None:
    """Create the run folder, or check that the unfinished run there is this one.

    `facts`: what beside the recipe decides the result, such as the dataset's fingerprint; a frozen dataclass.
    Raises InputError for a finished run and for an unfinished one of other settings.
    """
    run = job.run
    if job.options.fresh:
        run.delete_tree(first=["_SUCCESS", _SNAPSHOT, "recipe.json"])
    if run.exists("_SUCCESS"):
        raise InputError(f"{run} is finished; {_AGAIN}")
    if not write_begun(run, _file(job, facts)):
        _check_same(job, facts)
        step = saved_step(run)
        begin = f"step {step:,}" if step else "the beginning, as no checkpoint was saved"
        print(f"going on with the unfinished run {run} from {begin}", flush=True)


def saved_step(run: Storage) -> int:
    """The step of the newest checkpoint, by Ray Train's snapshot; 0 where none was saved."""
    try:
        latest = json.loads(run.read(_SNAPSHOT))["latest_checkpoint_result"]
    except FileNotFoundError:
        return 0
    return int(latest["metrics"]["step"]) if latest else 0


def check_begun(job: Job[Any], facts: Any) -> None:
    """Refuse an unfinished run of other settings before any other work is done for it.

    `facts`: as `open_run` takes them. Those that have their default yet are not compared.
    """
    if not job.options.fresh and job.run.exists("recipe.json"):
        default = {field.name for field in dataclasses.fields(facts) if getattr(facts, field.name) == field.default}
        _check_same(job, facts, default)


def _file(job: Job[Any], facts: Any) -> RunFile[Any, Any]:
    return RunFile(job.recipe_name, job.variant, job.recipe, facts, source_commit())


def _check_same(job: Job[Any], facts: Any, but: Set[str] = frozenset()) -> None:
    """Raise InputError where the run in the folder is of other settings or facts; `but`: facts that may differ."""
    try:
        # A field that is younger than the run has its default, which is how the run was trained.
        there = read_begun(job.run, type(job.recipe), type(facts)).to_json()
    except InputError:  # fields that are no more; `difference` names them
        there = json.loads(job.run.read("recipe.json"))
    mine = _file(job, facts).to_json()
    differences = difference(_comparable(mine, but), _comparable(there, but))
    if differences:
        raise InputError(f"{job.run} holds an unfinished run of other settings: {'; '.join(differences[:5])}; {_AGAIN}")


def _comparable(fields: dict[str, Any], but: Set[str]) -> dict[str, Any]:
    """Without what may differ: the name of the variant, the commit, and the places of pretrained parts."""
    but = {"variant", "commit", *but}
    return _without_places({name: value for name, value in fields.items() if name not in but})


def _without_places(facts: dict[str, Any]) -> dict[str, Any]:
    """Without the folders of pretrained parts, which `facts` know by their fingerprints wherever they lie today."""
    return {
        name: _without_places(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in _PLACES
    }


def check_new_run(job: Job[Any]) -> None:
    """Refuse a finished run before any other work is done for it."""
    check_batch(job.recipe.train, job.options.num_workers)
    if not job.options.fresh and job.run.exists("_SUCCESS"):
        raise InputError(f"{job.run} is finished; {_AGAIN}")


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
