"""The gallery of serve/web in a real Chromium, against a stand-in service."""

from pathlib import Path

from browser import Tab
from page_moves import generate, wait_made
from stand_in import Failure, StandIn, sweep_rows

pytest_plugins = ("page_fixtures",)


def test_gallery_by_pages(blank: Tab, service: StandIn) -> None:
    service.sweep = sweep_rows(30)
    blank.goto(service.url)
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait("document.querySelectorAll('#swept img').length === 24")
    assert blank.text("#gallery-news") == "Page 1: 24 images."
    assert blank.text("#previous-why") == "This is the first page."
    blank.click("#previous")
    blank.wait_text("#announcer", "This is the first page.")
    service.failures["/v1/gallery/image 025"] = [Failure(500, "gone")]
    blank.click("#next")
    blank.wait_text("#gallery-news", "Page 2: 6 images.")
    blank.wait("document.querySelectorAll('#swept img').length === 5")
    blank.wait_text("#swept .error", "The service failed (500): gone.")
    assert blank.text("#next-why") == "This is the last page."
    blank.click("#swept figure:last-child button")
    assert blank.run("['prompt', 'seed'].map((id) => document.getElementById(id).value)") == [
        service.sweep[29]["prompt"], "7029",
    ]  # fmt: skip
    blank.click("#previous")
    blank.wait_text("#gallery-news", "Page 1: 24 images.")
    asked = [request.query for request in service.asked("/v1/gallery")]
    assert asked == [{"limit": ["24"]}, {"limit": ["24"], "cursor": ["24"]}, {"limit": ["24"]}]


def test_nothing_moves_when_images_come(blank: Tab, service: StandIn, images: list[Path]) -> None:
    service.sweep = sweep_rows(30)
    service.hold("captions", "swept")
    blank.goto(service.url)
    blank.wait_text("#service", "Connected")
    # Each image is inserted with its final height, so nothing moves when it loads.
    blank.run(
        "window.early = 0, new MutationObserver(() => { early += [...document.querySelectorAll('#made img')]"
        ".filter((image) => image.naturalWidth === 0).length; })"
        ".observe(document.getElementById('made'), {childList: true, subtree: true}), null"
    )
    generate(blank, number="3")
    wait_made(blank, 3)
    assert blank.run("early") == 0
    blank.choose("#files", *images)
    blank.wait("[...document.querySelectorAll('.card img')].filter((image) => image.naturalWidth > 0).length === 3")
    shapes = blank.each(".preview", "[e.offsetWidth, e.offsetHeight]")
    assert shapes == [[112, 112]] * 3, "a preview takes the same place whatever is in it: 7rem"
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait("document.querySelectorAll('#swept figure').length === 24")
    places = (
        "[...document.querySelectorAll('#swept button, #swept a, #next')]"
        ".map((e) => e.offsetTop - document.getElementById('gallery').offsetTop)"
    )
    before = blank.run(places)
    assert len(before) == 24 + 24 + 1
    service.release()
    blank.wait("document.querySelectorAll('#swept img').length === 24")
    blank.wait_text("#captions-news", "Captioned: 3 of 3.")
    assert blank.run("[...document.querySelectorAll('#swept img')].every((image) => image.naturalWidth > 0)")
    assert blank.each("#swept a", "e.checkVisibility({visibilityProperty: true})") == [True] * 24
    assert blank.run(places) == before


def test_a_gallery_that_fails_can_be_asked_again(blank: Tab, service: StandIn) -> None:
    service.sweep = sweep_rows(30)
    service.failures["/v1/gallery"] = [Failure(500, "no disk"), Failure(500, "no disk yet")]
    blank.goto(service.url)
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait_text("#gallery-error", "The service failed (500): no disk.")
    for problem in ("The service failed (500): no disk yet.", ""):
        blank.run("document.querySelector('#gallery-error button').focus()")
        blank.press("Enter")
        blank.wait_text("#gallery-error", problem)
        blank.wait("document.activeElement.id === 'gallery-title'")
    blank.wait_text("#gallery-news", "Page 1: 24 images.")
    assert blank.text("#gallery-error") == ""
    blank.wait("document.querySelectorAll('#swept img').length === 24")
    # A later part of the gallery fails and is requested again.
    service.failures["/v1/gallery"] = [Failure(500, "no disk")]
    blank.click("#next")
    blank.wait_text("#gallery-error", "no disk")
    assert blank.each("#gallery-error button", "e.textContent") == ["Try again to load the gallery"]
    blank.click("#gallery-error button")
    blank.wait_text("#gallery-news", "Page 2: 6 images.")
