"""The promises of the marks: tests that start a process have the mark, and a flaky test has a reason."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from marks import check_flaky, pytest_collection_modifyitems, unmarked_process


def test_a_process_of_a_test_that_is_not_marked_is_refused() -> None:
    """In this process, by the hook that watches every test."""
    with pytest.raises(RuntimeError, match=r"_is_refused starts python.*: mark it `process`"):
        subprocess.run([sys.executable, "-c", ""], check=True)
    # Calls of libraries for facts about the machine do not count.
    subprocess.run(["uname"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.process
def test_a_process_of_a_test_that_is_marked_starts() -> None:
    subprocess.run([sys.executable, "-c", ""], check=True)


@pytest.mark.parametrize(
    ("event", "arguments", "is_marked", "found"),
    [
        ("subprocess.Popen", ("/bin/python", ["/bin/python", "-c", ""], None, None), False, "python"),
        ("subprocess.Popen", ("/bin/python", ["/bin/python", "-c", ""], None, None), True, None),
        ("subprocess.Popen", ("git", ["git", "log"], None, None), False, None),
        ("subprocess.Popen", (None, "sleep 3", None, None), False, "sleep"),
        ("os.posix_spawn", (b"/bin/chromium", [b"/bin/chromium"], {}), False, "chromium"),
        ("os.fork", (), False, "a"),
        ("open", ("/bin/python",), False, None),
    ],
)
def test_what_starts_a_process_is_known(event: str, arguments: Any, is_marked: bool, found: str | None) -> None:
    item: Any = SimpleNamespace(get_closest_marker=lambda name: name if is_marked else None)
    assert unmarked_process(event, arguments, item) == found


@pytest.mark.parametrize(
    ("fixtures", "params", "marks"),
    [
        (["tmp_path"], {}, set()),
        (["call_job", "ray_local"], {}, {"process"}),
        (["storage"], {"storage": "s3"}, {"process"}),
        (["storage"], {"storage": "local"}, set()),
        (["page", "browser"], {}, {"process", "nightly"}),
    ],
)
def test_fixtures_mark_their_tests(fixtures: list[str], params: dict[str, str], marks: set[str]) -> None:
    added: set[str] = set()
    item: Any = SimpleNamespace(
        fixturenames=fixtures,
        callspec=SimpleNamespace(params=params),
        path=Path("test_x.py"),
        add_marker=added.add,
        iter_markers=lambda name: [],
        get_closest_marker=lambda name: name if name in added else None,
    )
    pytest_collection_modifyitems([item])
    assert added == marks


@pytest.mark.parametrize("arguments", [(), ("since yesterday",), ("", "2026-11-28"), (1, 2)])
def test_a_flaky_test_says_why_and_since_when(arguments: tuple[Any, ...]) -> None:
    check_flaky("test", pytest.mark.flaky("the head answered late", "2026-11-28").mark)
    with pytest.raises(pytest.UsageError, match="REASON, DATE"):
        check_flaky("test", pytest.mark.flaky(*arguments).mark)
