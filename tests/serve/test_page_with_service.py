"""The page in a real Chromium with the service's own routes. Only the models are fake."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import HANG_S, Browser, Tab
from page_moves import generate, wait_made
from serving import COLOURS, KEY, Served, colour_of, listening, picture, write_sweep

from mmcore.storage import Storage
from serve import security
from serve.limits import Limits

pytest_plugins = ("page_fixtures",)


@pytest.fixture
def connected(browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tab]:
    # The service reads the rest of the body, however slowly it arrives.
    monkeypatch.setattr(security, "_MAX_DRAIN_S", HANG_S)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    write_sweep(sweep, {f"image {i}": picture(name) for i, name in enumerate([*COLOURS] * 8)})
    served = Served(
        limits=Limits(max_body_bytes=2**20, max_image_bytes=2**20, body_timeout_s=HANG_S),
        step_s=0.02,
        gallery=Storage(str(sweep)),
    )
    with listening(served) as url:
        tab = browser.open(url)
        tab.wait("!document.getElementById('key-form').hidden")
        tab.fill("#key", "not-the-key-0123456789")
        tab.click("#use-key")
        tab.wait_text("#key-error", "does not accept this key")
        tab.fill("#key", KEY)
        tab.click("#use-key")
        tab.wait_text("#service", "Connected")
        yield tab
        complaints = tab.complaints()
        tab.close()
    assert not complaints


def test_captions(connected: Tab, tmp_path: Path) -> None:
    paths = [tmp_path / "one.png", tmp_path / "two.png", tmp_path / "broken.png", tmp_path / "large.png"]
    for path, data in zip(paths, (picture("green"), picture("blue"), picture()[:60], bytes(5 * 2**20)), strict=True):
        path.write_bytes(data)
    connected.choose("#files", *paths[:3])
    connected.wait_text("#captions-news", "Captioned: 2 of 3.")
    told = connected.each(".card", "[...e.querySelectorAll('dt, dd')].map((each) => each.textContent)")
    assert ["words", "a green picture", "others", "some green picture"] in told
    assert ["words", "a blue picture", "others", "some blue picture"] in told
    assert "the image: broken image (image file is truncated)" in connected.text("#captioned .error")
    # Refused before it is read. The browser receives the message all the same.
    connected.click("#captions-clear")
    connected.choose("#files", paths[3])
    connected.wait_text("#captioned .error", "Too large for this service: the body has more than 1 MiB, the limit.")


def test_images_with_progress(connected: Tab) -> None:
    connected.run(
        "window.texts = new Set(), new MutationObserver(() => texts.add(document.getElementById('running-text')"
        ".textContent)).observe(document.getElementById('running-text'), {childList: true, characterData: true,"
        " subtree: true}), null"
    )
    generate(connected, "a red circle", number="2", seed="41", steps="20", guidance="2.5", negative="blur")
    wait_made(connected, 2)
    assert connected.each("#made figure p", "e.textContent") == ["Seed 41", "Seed 42"]
    drawn = """(() => { const c = document.createElement("canvas"), i = document.querySelectorAll("#made img")[1];
        c.width = c.height = 1; const d = c.getContext("2d"); d.drawImage(i, 0, 0);
        return [...d.getImageData(0, 0, 1, 1).data].slice(0, 3); })()"""
    assert tuple(connected.run(drawn)) == colour_of("a red circle", 42, 20, 2.5, "blur")
    steps = [text for text in connected.run("[...texts]") if " of 20" in text]
    assert len(steps) >= 5
    generate(connected, "x" * 1001)
    connected.wait_text("#images-error", "prompt: 1001 characters; at most 1000")
    assert connected.run("document.activeElement.id") == "prompt"


def test_gallery(connected: Tab) -> None:
    connected.run("document.getElementById('gallery').scrollIntoView()")
    connected.wait("document.querySelectorAll('#swept img').length === 24")
    connected.click("#next")
    connected.wait_text("#gallery-news", "Page 2: 8 images.")
    connected.wait("[...document.querySelectorAll('#swept img')].every((i) => i.complete && i.naturalWidth === 40)")
