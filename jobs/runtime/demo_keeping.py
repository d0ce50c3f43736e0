"""What of an earlier demo is kept, and what is made anew because its settings, or what it was made of, are others."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, cast

from jobs.runtime.job import Job
from jobs.runtime.source import source_commit
from jobs.runtime.sweep import read_plan, remove_sweep
from jobs.runtime.trainer import RunSummary
from mmcore.catalogue import RECIPES
from mmcore.errors import InputError
from mmcore.recipe import difference, recipe_to_json
from mmcore.run_files import RunFile, read_begun
from mmcore.storage import Storage


def keep_or_train(
    job: Job[Any], train: Callable[[Job[Any]], RunSummary], made_of: Mapping[str, str], sweep: Storage, parts: str
) -> RunSummary:
    """Keep a run that is finished, or go on with one under way, if it has the same settings and data; else train anew.

    Args:
        train: what trains the job; `job.options.fresh` asks for a training whatever is there.
        made_of: fingerprints of what the run learns from, by the names of its facts.
        sweep: what is made of the run, with its blocks in the folder `parts`: removed where it is trained anew.
    Returns: the run's summary, of now or of then.
    """
    fresh = job.options.fresh
    if not fresh and job.run.exists("recipe.json"):
        changes = _changes(job, made_of)
        if changes:
            print(f"the run that is there differs ({'; '.join(changes[:3])}): trained anew", flush=True)
            fresh = True
        elif job.run.exists("_SUCCESS"):
            print(
                f"{job.run} is finished, trained at commit {_begun(job).commit} (now {source_commit()}): kept "
                "(--fresh trains anew)",
                flush=True,
            )
            return cast(RunSummary, json.loads(job.run.read("_SUCCESS")))
    if fresh:
        # Before the training, not after it: what the old model made must not be taken for the new one's.
        remove_sweep(sweep, parts)
    return train(dataclasses.replace(job, options=dataclasses.replace(job.options, fresh=fresh)))


def _begun(job: Job[Any]) -> RunFile[Any, Any]:
    return read_begun(job.run, type(job.recipe), RECIPES[job.recipe_name].facts_type)


def _changes(job: Job[Any], made_of: Mapping[str, str]) -> list[str]:
    """In what the run that is there differs from `job`."""
    try:
        there = _begun(job)
    except InputError as error:  # of another version
        return [str(error)]
    theirs = {"settings": recipe_to_json(there.recipe), **{name: getattr(there.facts, name) for name in made_of}}
    return difference({"settings": recipe_to_json(job.recipe), **made_of}, theirs)


def remove_other(out: Storage, wanted: Mapping[str, Any], parts: str) -> None:
    """Remove what was made with other settings than `wanted`, so that it can be made anew."""
    plan = read_plan(out, parts)
    if plan is None:
        return
    changes = difference(dict(wanted), {name: plan["settings"].get(name) for name in wanted})
    if changes:
        print(f"{out} has other settings ({'; '.join(changes[:3])}): made anew", flush=True)
        remove_sweep(out, parts)
