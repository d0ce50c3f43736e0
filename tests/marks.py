"""The marks of tests, which the Makefile selects by; CONTRIBUTING.md describes them.

A test that starts a process has the mark `process`. The fixture that starts it sets the mark, or the test itself.
"""

import os
import sys
from typing import Any

import pytest

# Fixtures that start a process, or return a function that does.
FIXTURES_OF_PROCESSES = {"ray_local", "job_environment", "_s3_endpoint", "browser"}
# Programs that libraries call for facts about the machine or the sources. They take milliseconds.
QUESTIONS = {"git", "uname", "lscpu", "ldconfig", "nvidia-smi", "sh", "df", "getconf"}
# Tests of the page in the gate. All other browser tests are nightly.
PAGE_AT_THE_GATE = "test_page_with_service.py"

_running: pytest.Item | None = None


def unmarked_process(event: str, arguments: tuple[Any, ...], item: pytest.Item | None) -> str | None:
    """The program that `item` starts without the mark, from Python's audit event; else None."""
    if event not in {"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty"} or item is None:
        return None
    command = arguments[1] if len(arguments) > 1 else ["a copy of this process"]
    command = [command] if isinstance(command, str | bytes | os.PathLike) else list(command)
    program = os.path.basename(os.fsdecode(command[0]).split()[0])
    return None if program in QUESTIONS or item.get_closest_marker("process") else program


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    program = unmarked_process(event, arguments, _running)
    if program is not None:
        raise RuntimeError(f"{_running.nodeid if _running else ''} starts {program}: mark it `process`")


sys.addaudithook(_refuse)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global _running
    _running = item


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    global _running
    _running = None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        # A fixture with the parameter "s3" requests its server during its setup.
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if FIXTURES_OF_PROCESSES & fixtures or any(each == "s3" for each in params):
            item.add_marker("process")
        if "browser" in fixtures and item.path.name != PAGE_AT_THE_GATE:
            item.add_marker("nightly")
        for mark in item.iter_markers("flaky"):
            check_flaky(item.nodeid, mark)
            item.add_marker("nightly")
    # Slow files first, so that at the end no worker is left alone with one.
    long = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in long)


def check_flaky(name: str, mark: pytest.Mark) -> None:
    """Raises: pytest.UsageError for a mark without a reason and date."""
    if len(mark.args) != 2 or mark.kwargs or not all(isinstance(word, str) and word for word in mark.args):
        raise pytest.UsageError(f"{name}: write @pytest.mark.flaky(REASON, DATE), DATE as 2026-11-28")
