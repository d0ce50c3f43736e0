"""Takes the picture of the served page for the documents: captions, generated images, the start of the gallery.

Command: python tests/serve/take_screenshot.py URL KEY OUT.png IMAGE [IMAGE ...]
"""

import sys
from pathlib import Path

from browser import Tab, chromium, program

PROMPT = "a large red circle and a small blue square"
SLOW_S = 300.0
WIDTH, HEIGHT = 1180, 1640


def fill(tab: Tab, key: str, images: list[Path]) -> None:
    tab.wait("!document.getElementById('key-form').hidden")
    tab.fill("#key", key)
    tab.click("#use-key")
    tab.wait_text("#service", "Connected", SLOW_S)
    tab.choose("#files", *images)
    tab.wait_text("#captions-news", f"Captioned: {len(images)} of {len(images)}.", SLOW_S)
    for name, value in {"prompt": PROMPT, "number": "4", "seed": "7"}.items():
        tab.fill(f"#{name}", value)
    tab.click("#generate")
    tab.wait("document.querySelectorAll('#made img').length === 4", SLOW_S)
    tab.run("document.getElementById('gallery').scrollIntoView()")
    tab.wait("document.querySelectorAll('#swept img').length > 0", SLOW_S)
    tab.wait("document.querySelectorAll('#swept .busy').length === 0", SLOW_S)
    tab.run("document.activeElement.blur(), window.scrollTo(0, 0)")


if __name__ == "__main__":
    url, key, out, *images = sys.argv[1:]
    found = program()
    assert found, "no Chromium here (Debian: apt install chromium)"
    with chromium(found) as browser:
        tab = browser.open(url, WIDTH, HEIGHT)
        fill(tab, key, [Path(image) for image in images])
        tab.screenshot(Path(out), whole=False)
        print("\n".join(tab.complaints()))
