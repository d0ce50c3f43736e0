"""The catalogue, the job files and the recipes agree."""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest

from mmcore.catalogue import RECIPES

JOBS = Path(__file__).resolve().parents[2] / "jobs"
MAX_LINES = 60


def job_of(name: str) -> str:
    stage = RECIPES[name].stage
    return name if stage is None else stage[0]


def test_each_job_that_trains_has_an_entry() -> None:
    names = {path.stem.removeprefix("train_") for path in JOBS.glob("train_*.py")}
    assert names == {job_of(name) for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_job_is_short_and_of_its_entry(name: str) -> None:
    path, entry = JOBS / f"train_{job_of(name)}.py", RECIPES[name]
    job: Any = importlib.import_module(f"jobs.{path.stem}")
    assert len(path.read_text().splitlines()) <= MAX_LINES
    if entry.stage is None:
        assert job.VARIANTS is entry.variants
    else:
        assert job.STAGES[entry.stage[1]] == name
    assert "smoke" in entry.variants, "what runs with no network"
    assert {"shapes", "report"} & set(entry.variants), "what runs without --variant"
    assert {type(recipe) for recipe in entry.variants.values()} == {entry.recipe_type}
    assert dataclasses.is_dataclass(entry.facts_type)
    assert all(words in job.__doc__ for words in ("Paper: ", "Hardware", f"python jobs/{path.name} --variant"))
