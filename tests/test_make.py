"""The Makefile without its installs: the commands that it would run, their folder, and when nothing is to be done."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files that make looks at, in a folder with a space in its name."""
    folder = tmp_path / "a clone"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/run"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def outside_make() -> dict[str, str]:
    """The environment without variables that would turn a `make` inside `make test` into a sub-make, or pass on its
    arguments.
    """
    of_make = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "TEST_WORKERS")
    return {name: value for name, value in os.environ.items() if name not in of_make}


def make(clone: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=clone,
        env=outside_make(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def fake_install(clone: Path, *, for_tests: bool = False) -> Path:
    """A `.venv` like the one of `make demo`, or of `make setup`, whose Python only prints its arguments."""
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "called: $*"\n')
    python.chmod(0o755)
    stamp = clone / ".venv" / ".installed"
    stamp.write_text(f"{clone.resolve()}\n")
    if for_tests:
        (clone / ".venv" / ".installed-for-tests").touch()
    return stamp


def test_help_is_the_default(clone: Path) -> None:
    text = make(clone).stdout
    for target in ("setup", "demo", "test", "test-all", "check", "clean"):
        assert f"make {target} " in text


INSTALL = "pip install --disable-pip-version-check -c constraints.txt -e"


def test_setup_installs_the_tested_versions(clone: Path) -> None:
    text = make(clone, "-n", "setup").stdout
    assert "-m venv .venv" in text
    assert f"{INSTALL} .\n" in text
    assert f"{INSTALL} '.[dev]'\n" in text


def test_a_second_run_does_nothing(clone: Path) -> None:
    fake_install(clone, for_tests=True)
    text = make(clone, "setup").stdout
    assert "called" not in text
    assert make(clone, "demo", "ARGS=--fresh").stdout.splitlines()[-1] == "called: jobs/demo.py --fresh"


def test_the_demo_needs_no_packages_of_the_tests(clone: Path) -> None:
    assert f"{INSTALL} .\n" in (text := make(clone, "-n", "demo").stdout)
    assert "[dev]" not in text
    fake_install(clone)
    for target in ("setup", "check", "test", "test-all"):
        lines = make(clone, "-n", target).stdout.splitlines()
        assert [line for line in lines if "pip install" in line] == [f".venv/bin/python -m {INSTALL} '.[dev]'"]
    make(clone, "setup")
    assert "pip install" not in make(clone, "-n", "test").stdout


def test_what_only_tests_need_is_no_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=]", text)[0].lower() for text in requirements}

    needed = names(project["dependencies"])
    assert not needed & names(project["optional-dependencies"]["dev"])
    assert not needed & {"pytest", "moto", "mypy", "ruff", "openai", "httpx", "datasets"}


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_pull_that_changes_requirements_installs_anew(clone: Path, name: str) -> None:
    stamp = fake_install(clone)
    later = stamp.stat().st_mtime + 1
    os.utime(clone / name, (later, later))
    assert "pip install" in make(clone, "-n", "setup").stdout


def test_a_moved_clone_installs_anew(clone: Path) -> None:
    fake_install(clone)
    moved = clone.rename(clone.with_name("moved here"))
    assert "pip install" in make(moved, "-n", "setup").stdout
    # Run for real: programs such as .venv/bin/ray contain the path of the old folder's Python and must be removed.
    (moved / ".venv" / "bin" / "ray").touch()
    make(moved, "setup", "PYTHON=true", check=False)
    assert not (moved / ".venv" / "bin" / "ray").exists()


def test_an_old_python_is_refused_in_words(clone: Path, tmp_path: Path) -> None:
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\nexit 1\n')
    old.chmod(0o755)
    done = make(clone, "setup", f"PYTHON={old}", check=False)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "3.9.2" in done.stderr
    assert not (clone / ".venv").exists()


def test_an_install_that_broke_off_is_not_taken_for_one(clone: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    # Its venv has a Python whose pip fails, as without a network.
    python.write_text(
        '#!/bin/sh\n[ "$2" = venv ] || exit 0\n'
        'mkdir -p .venv/bin && printf "#!/bin/sh\\nexit 1\\n" > .venv/bin/python && chmod +x .venv/bin/python\n'
    )
    python.chmod(0o755)
    assert make(clone, "setup", f"PYTHON={python}", check=False).returncode != 0
    assert not (clone / ".venv" / ".installed").exists()


TESTS = "called: -m pytest -n 2 --dist loadfile --no-loadscope-reorder"


def test_checks_come_before_tests_and_long_tests_only_where_asked(clone: Path) -> None:
    fake_install(clone, for_tests=True)
    lines = [line for line in make(clone, "test").stdout.splitlines() if line.startswith("called")]
    assert lines == ["called: -m ruff check .", "called: -m mypy", f"{TESTS} -m not (nightly or soak)"]
    assert make(clone, "test-all").stdout.splitlines()[-1] == TESTS


def test_ci_runs_make_test_from_anywhere(clone: Path, tmp_path: Path) -> None:
    fake_install(clone, for_tests=True)
    command = [clone / ".ci" / "run"]
    done = subprocess.run(command, cwd=tmp_path, env=outside_make(), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{TESTS} -m not (nightly or soak)"


def test_clean_leaves_what_make_did_not_make(clone: Path) -> None:
    fake_install(clone)
    for name in ("runs/demo/index.html", "runs/mine/model", "jobs/__pycache__/a.pyc", "out/data"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    make(clone, "clean")
    left = sorted(str(path.relative_to(clone)) for path in clone.rglob("*") if path.is_file())
    assert left == [".ci/run", "Makefile", "constraints.txt", "out/data", "pyproject.toml", "runs/mine/model"]


def test_constraints_hold_on_any_machine() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        name, equals, version = line.partition("==")
        assert equals, line
        assert "+" not in version, f"{line}: a build of this machine"
        assert not name.startswith(("nvidia", "triton", "mmcore")), line
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(set(names)) == len(names)
    assert {"torch", "ray", "transformers", "pytest", "ruff", "mypy"} <= set(names)
