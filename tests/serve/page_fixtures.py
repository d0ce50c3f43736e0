"""Fixtures for tests of the page: one Chromium, and for each test a stand-in service and a tab."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAMS, Browser, Tab, chromium, program
from page_moves import HOSTILE
from PIL import Image
from stand_in import StandIn, standing_in


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if (found := program()) is None:
        reason = (
            f"the page is tested in Chromium, and this machine has none of {', '.join(PROGRAMS)} (Debian: apt "
            "install chromium)"
        )
        # Fail instead of skipping in CI: a skipped page would count as tested.
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; with CI set the tests of the page are not skipped", pytrace=False)
        pytest.skip(reason)
    with chromium(found) as started:
        yield started


@pytest.fixture
def service() -> Iterator[StandIn]:
    """New for each test, so that no late message of the previous test arrives."""
    with standing_in() as stand_in:
        yield stand_in


@pytest.fixture
def blank(browser: Browser, service: StandIn) -> Iterator[Tab]:
    """An empty tab."""
    tab = browser.open()
    yield tab
    complaints = tab.complaints()
    tab.close()
    assert not complaints


@pytest.fixture
def page(blank: Tab, service: StandIn) -> Tab:
    """The connected page."""
    blank.goto(service.url)
    blank.wait_text("#service", "Connected")
    return blank


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Three images of different shapes and formats."""
    paths = [tmp_path / "wide.png", tmp_path / "tall.jpg", tmp_path / f"{HOSTILE.replace('/', '')}.png"]
    for path, size in zip(paths, [(300, 100), (80, 240), (64, 64)], strict=True):
        Image.new("RGB", size, (90, 140, 60)).save(path)
    return paths
