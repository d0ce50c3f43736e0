"""What a person does on the page, for its tests."""

import time
from collections.abc import Callable

from browser import HANG_S, Tab

# As markup, it would show itself.
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\"'`${7*7}"


def generate(page: Tab, prompt: str = "a red circle", **fields: str) -> None:
    """Fill the form as a person does, and press its button."""
    for name, value in {"prompt": prompt, **fields}.items():
        page.fill(f"#{name}", value)
    page.click("#generate")


def wait_made(page: Tab, count: int) -> None:
    page.wait(f"document.querySelectorAll('#made img').length === {count}")
    page.wait("[...document.querySelectorAll('#made img')].every((image) => image.complete && image.naturalWidth > 0)")


def wait_until(condition: Callable[[], bool], timeout_s: float = HANG_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Clock:
    """The page's clock, stopped until it is put forward: a second that is shown stays as long as it takes to see it.
    Timers run on. To be made before the page counts, or before it is there."""

    def __init__(self, page: Tab) -> None:
        self._page = page
        # A whole number, so that sums and differences are exact.
        stop = "window.clockMs = Math.ceil(performance.now()), performance.now = () => clockMs, null"
        page.call("Page.addScriptToEvaluateOnNewDocument", source=stop)
        page.run(stop)

    def forward(self, seconds: float) -> None:
        self._page.run(f"clockMs += {1000 * seconds}")
