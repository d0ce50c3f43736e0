"""jobs/runtime/source.py: results are not written to folders that the cluster removes at its end."""

from pathlib import Path

import pytest

from jobs import caption, demo, export, generate, prepare, train_ldm
from jobs.runtime import source
from jobs.runtime.job import parse_job
from jobs.runtime.scores_place import find_scores_place
from mmcore.errors import InputError

RUN = "runs/ldm/default"
DOORS = [
    ("--storage out", lambda: parse_job("jobs/train_ldm.py", train_ldm.VARIANTS, "", ["--storage", "out"])),
    ("--storage ./out", lambda: parse_job("jobs/train_ldm.py", train_ldm.VARIANTS, "", [])),
    ("--storage out", lambda: prepare.prepare(prepare.PrepareSettings())),
    ("--storage runs/demo", lambda: demo.run_demo(demo.DemoSettings())),
    ("--out here", lambda: caption.caption(caption.CaptionSettings(run=RUN, images="images", out="here"))),
    ("--out here", lambda: generate.generate(generate.GenerateSettings(run=RUN, prompts="p.txt", out="here"))),
    ("--out here", lambda: export.export(export.ExportSettings(run=RUN, out="here"))),
    (f"--run {RUN}", lambda: find_scores_place(RUN)),
]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a job that was submitted with its working directory."""
    folder = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("named", "door"), DOORS)
def test_every_job_refuses_to_write_there(copy, named, door):
    with pytest.raises(InputError, match=f"^{named}: would lie in Ray's copy") as refused:
        door()
    assert f" {Path.home()}/" in str(refused.value)
    assert not list(copy.iterdir())


def test_what_lies_elsewhere_is_taken(copy, monkeypatch, tmp_path):
    for folder in (f"{tmp_path}/out", "s3://bucket/out", "~/out"):
        source.output_storage(folder, "--out")
    with pytest.raises(InputError, match="Ray's copy"):
        source.output_storage(f"{copy}/out", "--out")
    # Shipped code that changes its folder, and code that was not shipped.
    monkeypatch.chdir(tmp_path)
    source.output_storage("out", "--out")
    monkeypatch.setattr(source, "ROOT", copy)
    with pytest.raises(InputError, match="Ray's copy"):
        source.output_storage("out", "--out")
