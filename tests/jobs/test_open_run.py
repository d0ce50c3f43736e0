"""Whether the unfinished run in a folder is the one that a job would go on with."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs import train_ldm
from jobs.runtime.job import Job, parse_job
from jobs.runtime.run_folder import open_run
from mmcore.errors import InputError

FACTS: dict[str, Any] = {"columns": ["latents"], "scaling_factor": 0.5}
YOUNGER = "unshifted_share"


def job(storage: Path, *flags: str) -> Job:
    return parse_job(train_ldm.__file__, train_ldm.VARIANTS, "", ["--storage", str(storage), *flags])


def begun_before(job: Job) -> None:
    """An unfinished run of `job` as a version wrote it that did not know the field yet."""
    open_run(job, FACTS)
    there = json.loads(job.run.read("recipe.json"))
    del there["settings"]["noise"][YOUNGER]
    job.run.write("recipe.json", json.dumps(there).encode())


def test_a_run_begun_before_a_field_was_there_goes_on_with_its_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_then = job(tmp_path, "--unshifted-share", "0")
    begun_before(as_then)
    open_run(as_then, FACTS)
    assert f"going on with the unfinished run {as_then.run}" in capsys.readouterr().out


def test_another_value_than_the_default_is_another_run(tmp_path: Path) -> None:
    begun_before(job(tmp_path, "--unshifted-share", "0"))
    with pytest.raises(InputError, match=r"other settings: settings\.noise\.unshifted_share: 0\.25 \(there: 0\.0\)"):
        open_run(job(tmp_path, "--unshifted-share", "0.25"), FACTS)


def test_a_field_that_is_no_more_is_named(tmp_path: Path) -> None:
    same = job(tmp_path)
    open_run(same, FACTS)
    there = json.loads(same.run.read("recipe.json"))
    there["settings"]["noise"]["of_old"] = 3
    same.run.write("recipe.json", json.dumps(there).encode())
    with pytest.raises(InputError, match=r"other settings: settings\.noise\.of_old: None \(there: 3\)"):
        open_run(same, FACTS)


@pytest.mark.parametrize(("facts", "named"), [({"columns": ["pixels"]}, "columns"), ({"scaling_factor": 2}, "scaling")])
def test_other_facts_are_another_run(tmp_path: Path, facts: dict[str, Any], named: str) -> None:
    same = job(tmp_path)
    open_run(same, FACTS)
    with pytest.raises(InputError, match=f"other settings: {named}.*--fresh to start anew"):
        open_run(same, {**FACTS, **facts})
