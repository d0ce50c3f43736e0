"""Actions of a person on the page, for its tests."""

import time
from collections.abc import Callable

from browser import HANG_S, Tab

# If inserted as markup, it would be visible as such.
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>&amp;\"'`${7*7}"


def generate(page: Tab, prompt: str = "a red circle", **fields: str) -> None:
    """Fill in the form as a person does, and submit it."""
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
    """Stop the page's clock and advance it by hand, so that a displayed second stays. Timers keep running.

    To be called before the page starts to count, or before it is loaded.
    """

    def __init__(self, page: Tab) -> None:
        self._page = page
        # An integer, so that sums and differences are exact.
        stop = "window.clockMs = Math.ceil(performance.now()), performance.now = () => clockMs, null"
        page.call("Page.addScriptToEvaluateOnNewDocument", source=stop)
        page.run(stop)

    def forward(self, seconds: float) -> None:
        self._page.run(f"clockMs += {1000 * seconds}")
