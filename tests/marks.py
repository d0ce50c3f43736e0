"""The marks of the tests, by which the Makefile chooses: what CONTRIBUTING.md says of them is held here.

A test that starts a process is marked `process`: by the fixture that starts it, or by hand where it does so itself.
"""

import os
import sys
from typing import Any

import pytest

# Each starts a process, or hands out what starts one.
FIXTURES_OF_PROCESSES = {"ray_local", "job_environment", "_s3_endpoint", "browser"}
# Programs that libraries ask about the machine or the sources: over in milliseconds, and nothing waits for them.
QUESTIONS = {"git", "uname", "lscpu", "ldconfig", "nvidia-smi", "sh", "df", "getconf"}
# What the gate sees of the page; all else in a browser is nightly.
PAGE_AT_THE_GATE = "test_page_with_service.py"

_running: pytest.Item | None = None


def unmarked_process(event: str, arguments: tuple[Any, ...], item: pytest.Item | None) -> str | None:
    """The program that `item` starts without being marked, of Python's audit event; None for anything else."""
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
        # A fixture with the parameter "s3" asks for its server when it is set up.
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if FIXTURES_OF_PROCESSES & fixtures or any(each == "s3" for each in params):
            item.add_marker("process")
        if "browser" in fixtures and item.path.name != PAGE_AT_THE_GATE:
            item.add_marker("nightly")
        for mark in item.iter_markers("flaky"):
            check_flaky(item.nodeid, mark)
            item.add_marker("nightly")
    # Files that take long come first: at the end, of two workers neither is alone with one.
    long = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in long)


def check_flaky(name: str, mark: pytest.Mark) -> None:
    """Raises: pytest.UsageError where a mark does not say why and since when."""
    if len(mark.args) != 2 or mark.kwargs or not all(isinstance(word, str) and word for word in mark.args):
        raise pytest.UsageError(f"{name}: write @pytest.mark.flaky(REASON, DATE), DATE as 2026-11-28")
