"""CONTRIBUTING.md's recipe, added to a copy of the repository as its text says, trains, opens and captions there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import RunJob

ROOT = Path(__file__).resolve().parents[1]
# A line that names a file in backticks, then the file's text.
BLOCK = re.compile(r"^`([\w/]+\.\w+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPES = "RECIPES: dict[str, Entry] = {\n"
# In the README's tree, a job that trains and a captioner.
NEIGHBOURS = (r"train_ldm\.py", r"cross_attention\.py")
# Tests that ask something of every recipe.
OF_ALL = ("tests/test_readme.py", "tests/jobs/test_catalogue.py")
JOB = "jobs/train_recurrent_captioner.py"
# Through the doors of bulk captioning and the service, which know the recipe by the catalogue alone.
CAPTION = """
import sys
import numpy as np
from mmcore.trained.captioner import open_captioner
captioner = open_captioner(sys.argv[1]).load()
size = captioner.image_size
captions = captioner.caption(np.zeros((2, size, size, 3), np.uint8), captioner.options)
print(len(captions), all(isinstance(caption, str) for caption in captions))
"""


def copy_of_the_repository(folder: Path) -> Path:
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def add_recipe(root: Path) -> dict[str, str]:
    """Follow the text; returns what was written, by file."""
    blocks = dict(BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text()))
    readme = root / "README.md"
    for line, before in zip(blocks.pop(readme.name).splitlines(), NEIGHBOURS, strict=True):
        there, found = re.subn(rf"^( +{before} .*)$", rf"\1\n{line}", readme.read_text(), flags=re.MULTILINE)
        assert found == 1
        readme.write_text(there)
    for name, text in blocks.items():
        path = root / name
        if not path.exists():
            path.write_text(text)
            continue
        imports, _, entry = text.partition("\n\n")
        there = re.sub(r"^from mmcore\.captioners import .*$", imports, path.read_text(), flags=re.MULTILINE)
        assert there.count(imports) == there.count(RECIPES) == 1
        path.write_text(there.replace(RECIPES, RECIPES + entry))
    return blocks


def test_a_recipe_is_added_by_what_contributing_says(
    tmp_path: Path, run_job: RunJob, shared_ray: dict[str, str]
) -> None:
    root = copy_of_the_repository(tmp_path / "copy")
    blocks = add_recipe(root)
    _model, job, catalogue, test = blocks
    assert (job, catalogue) == (JOB, "mmcore/catalogue.py")
    assert len(blocks[job].splitlines()) <= 60
    # Ruff as it is configured: a newcomer's `make check` must not stumble over the example.
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", *blocks], cwd=root, check=True)
    here = {"PYTHONPATH": str(root)}
    run_job("-m", "pytest", "-q", "-p", "no:cacheprovider", test, *OF_ALL, cwd=root, env=here)
    storage = tmp_path / "out"
    joined = {**here, **shared_ray}
    done = run_job(root / JOB, "--variant", "smoke", "--storage", storage, "--num-workers", "1", cwd=root, env=joined)
    run = storage / "runs" / "recurrent_captioner" / "default"
    assert f"finished: {run}/model" in done.stdout
    assert run_job("-c", CAPTION, run, cwd=root, env=here).stdout.split() == ["2", "True"]
