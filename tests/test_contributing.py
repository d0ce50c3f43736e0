"""The recipe of CONTRIBUTING.md works: added to a copy of the repository, it trains, opens and captions."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import RunJob

ROOT = Path(__file__).resolve().parents[1]
# A line with the path of a file in backticks, then the text of the file.
BLOCK = re.compile(r"^`([\w/]+\.\w+)`:\n\n(`{3,4})\w+\n(.*?)^\2$", re.MULTILINE | re.DOTALL)
RECIPES = "RECIPES: dict[str, Entry] = {\n"
# The files of the checkout, including new ones: a recipe is checked before it is committed.
LIST = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
IMPORT = re.compile(r"^from mmcore\.captioners import (\([^)]*\)|.*)$", re.MULTILINE)
# Tests that check every recipe.
OF_ALL = (
    "tests/test_docs.py::test_its_program_parses_a_command",
    "tests/test_docs.py::test_every_job_has_an_example",
    "tests/jobs/test_catalogue.py",
)
JOB = "jobs/train_recurrent_captioner.py"
# As the service opens it, by the catalogue alone.
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
    files = subprocess.run(LIST, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def add_recipe(root: Path) -> dict[str, str]:
    """Do what the text says. Returns the written text by file."""
    found = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text())
    blocks = {name: text for name, _fence, text in found if not name.endswith(".md")}
    for name, _fence, text in found:
        if name.endswith(".md"):
            path = root / name
            path.write_text(f"{path.read_text()}\n{text}")
    for name, text in blocks.items():
        path = root / name
        if not path.exists():
            path.write_text(text)
            continue
        imports, _, entries = text.partition(f"\n\n{RECIPES}")
        entry, _, _ = entries.partition("    #")
        there = path.read_text()
        assert len(IMPORT.findall(there)) == there.count(RECIPES) == 1
        # Next to recipes that others have added.
        modules = sorted({name for line in (imports, there) for name in re.findall(r"\w+", IMPORT.findall(line)[0])})
        listed = "".join(f"    {name},\n" for name in modules)
        there = IMPORT.sub(f"from mmcore.captioners import (\n{listed})", there)
        path.write_text(there.replace(RECIPES, RECIPES + entry))
    return blocks


def commands() -> list[list[str]]:
    """The commands of the text, split as in a shell."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition("### 6. Try it")[2].split("```")[1]
    lines = section.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


def test_a_recipe_is_added_by_what_contributing_says(
    tmp_path: Path, run_job: RunJob, shared_ray: dict[str, str]
) -> None:
    root = copy_of_the_repository(tmp_path / "copy")
    blocks = add_recipe(root)
    _model, job, catalogue, test = blocks
    assert (job, catalogue) == (JOB, "mmcore/catalogue.py")
    assert len(blocks[job].splitlines()) <= 60
    # Ruff as configured: `make check` must pass with the example.
    subprocess.run([sys.executable, "-m", "ruff", "check", "-q", *blocks], cwd=root, check=True)
    here = {"PYTHONPATH": str(root)}
    run_job("-m", "pytest", "-q", "-p", "no:cacheprovider", test, *OF_ALL, cwd=root, env=here)
    joined = {**here, **shared_ray}
    train, caption = commands()
    assert (train[0], caption[0]) == (JOB, "jobs/caption.py")
    done = run_job(*train, cwd=root, env=joined)
    run = root / "out" / "runs" / "recurrent_captioner" / "default"
    assert f"finished: {run}/model" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("next: ")]
    words = shlex.split(line)
    assert words[2:5] == ["jobs/caption.py", "--run", "out/runs/recurrent_captioner/default"], "not another training"
    assert "caption: 300 images" in run_job(*words[2:], "--dry-run", cwd=root, env=joined).stdout
    assert "caption: 300 images" in run_job(*caption, "--dry-run", cwd=root, env=joined).stdout
    assert run_job("-c", CAPTION, run, cwd=root, env=here).stdout.split() == ["2", "True"]
