"""The page by keyboard, on a phone, for screen readers, in dark and light mode, measured in a real Chromium."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from browser import Tab
from page_moves import generate, wait_made, wait_until
from stand_in import Failure, StandIn, sweep_rows

pytest_plugins = ("page_fixtures",)

LONG = "Donaudampfschifffahrtsgesellschaftskapitän" * 6
GENERATE = "/v1/images/generations"
MIN_CONTRAST = 4.5  # WCAG 2.2, 1.4.3
MIN_TARGET = 24  # CSS pixels; WCAG 2.2, 2.5.8

# For each visible text: its contrast with its background (WCAG 2.2, relative luminance).
CONTRASTS = """(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => { const [r, g, b] = parse(colour).slice(0, 3).map((part) => {
    const c = part / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const opaque = (colour) => (parse(colour)[3] ?? 1) === 1;
  const behind = (e) => { while (e.parentElement && !opaque(getComputedStyle(e).backgroundColor)) e = e.parentElement;
    return getComputedStyle(e).backgroundColor; };
  const has = (e) => e.value || [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== "");
  const shown = (e) => has(e) && e.checkVisibility() && !e.closest(".unseen");
  return [...document.body.querySelectorAll("*")].filter(shown).map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${e.tagName}#${e.id}.${e.className}: ${e.textContent.slice(0, 30)}`];
  });
})()"""
FOCUSED = """(() => {
  const e = document.activeElement, ring = getComputedStyle(e.id === "files" ? e.nextElementSibling : e);
  return e === document.body ? null : {name: e.id || e.tagName + " " + e.textContent, outline: ring.outlineStyle,
    width: parseFloat(ring.outlineWidth)};
})()"""
CONTROLS = """[...document.querySelectorAll("a[href], button, input, select, summary, textarea")]
  .filter((e) => e.checkVisibility()).map((e) => e.id || e.tagName + " " + e.textContent)"""


@pytest.fixture
def full(blank: Tab, service: StandIn, images: list[Path]) -> Tab:
    """The page with all its parts: captions, results, a gallery, errors, a running request, long words."""
    service.sweep = [*sweep_rows(29), {"image_id": "long", "prompt": LONG, "seed": 2**53 - 1, "url": ""}]
    service.captions = {"resnet": LONG, LONG: "a dog", "third": "a dog on grass", "fourth": "grass"}
    service.failures["/v1/captions"] = [Failure(500, LONG)]
    service.failures["/v1/gallery/image 001"] = [Failure(404, LONG)]
    blank.goto(service.url)
    blank.wait_text("#service", "Connected")
    blank.choose("#files", *images)
    blank.wait_text("#captions-news", "Captioned: 2 of 3.")
    generate(blank, LONG, number="3", negative=LONG)
    wait_made(blank, 3)
    service.failures[GENERATE] = [Failure(401, "")]
    blank.click("#generate")
    blank.wait_text("#images-error", "The service needs a key.")
    blank.click("#images-error button")
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait("document.querySelectorAll('#swept img').length === 23")
    blank.wait_text("#swept .error", LONG)
    service.failures["/v1/captions"] = [Failure(429, LONG, headers={"Retry-After": "1000"})]
    blank.choose("#files", images[0])
    blank.wait_text(".card", "this image goes again in")
    return blank


@pytest.fixture
def running(full: Tab, service: StandIn) -> Tab:
    """The same page while a request waits in the queue."""
    service.hold("step 5")
    full.click("#generate")
    full.wait_text("#running-text", "Step 4 of 8")
    return full


@pytest.mark.parametrize("width", [320, 360, 768])
def test_nothing_is_wider_than_the_window(running: Tab, width: int) -> None:
    running.resize(width, 740)
    assert running.run("document.scrollingElement.scrollWidth") == width
    rights = running.each("body *", "[e.checkVisibility() ? e.getBoundingClientRect().right : 0, e.id, e.className]")
    assert not [row for row in rights if row[0] > width]
    targets = "a[href], button, .button, input:not(.unseen), select, summary, textarea"
    sizes = running.each(targets, "[e.offsetWidth, e.offsetHeight, e.checkVisibility(), e.id, e.textContent]")
    assert not [row for row in sizes if row[2] and min(row[:2]) < MIN_TARGET]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(running: Tab, scheme: str) -> None:
    running.media(prefers_color_scheme=scheme)
    dark = running.run("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    contrasts = running.run(CONTRASTS)
    assert len(contrasts) > 100
    assert not [row for row in contrasts if row[0] < MIN_CONTRAST]


def walk(page: Tab, *, shift: bool) -> list[dict[str, Any]]:
    """The focused elements, by Tab from the start until the focus leaves the page."""
    # Focus only the body: the next Tab goes to the first control, or to the last.
    page.run("document.body.tabIndex = -1, document.body.focus(), document.body.removeAttribute('tabindex')")
    found: list[dict[str, Any]] = []
    for _ in range(500):
        page.press("Tab", shift=shift)
        focused = page.run(FOCUSED)
        if focused is None:
            return found
        found.append(focused)
    raise AssertionError(f"a trap: {found[-5:]}")


def test_every_control_by_keyboard_in_order_and_seen(running: Tab) -> None:
    controls = running.run(CONTROLS)
    assert len(controls) > 50
    for shift in (False, True):
        walked = walk(running, shift=shift)
        names = [focused["name"] for focused in walked]
        assert names == (controls[::-1] if shift else controls)
        assert not [focused for focused in walked if focused["outline"] == "none" or focused["width"] < 2]


def test_whole_use_by_keyboard_only(blank: Tab, service: StandIn) -> None:
    service.key = "k-1"

    def to(name: str) -> None:
        for _ in range(100):
            blank.press("Tab")
            if (blank.run(FOCUSED) or {}).get("name", "").startswith(name):
                return
        raise AssertionError(f"Tab never comes to {name}")

    blank.goto(service.url)
    blank.wait_text("#service", "The service needs a key.")
    to("key")
    blank.type("k-1")
    blank.press("Enter")
    blank.wait_text("#service", "Connected")
    assert blank.run("document.activeElement.id") == "files", "the field is gone; the keyboard goes on behind it"
    to("prompt")
    blank.type("a blue square")
    blank.press("Enter", control=True)
    wait_made(blank, 1)
    to("BUTTON Use seed")
    blank.press(" ")
    assert blank.run("document.activeElement.id") == "seed"
    service.hold("step 1")
    to("generate")
    blank.press("Enter")
    wait_until(lambda: len(service.asked(GENERATE)) == 2)
    to("cancel")
    blank.press(" ")
    blank.wait_text("#images-error", "Cancelled.")
    assert [request.json.get("seed") for request in service.asked(GENERATE)] == [None, 1000]


def test_everything_has_a_name(running: Tab) -> None:
    nodes = running.call("Accessibility.getFullAXTree")["nodes"]
    fields = {"button", "textbox", "spinbutton", "combobox", "progressbar"}
    kinds = fields | {"link", "image", "region", "navigation", "form"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in kinds
    ]
    assert {role for role, _ in named} == kinds
    assert not [row for row in named if row[1].strip() == ""]
    headings = [
        next(int(p["value"]["value"]) for p in node["properties"] if p["name"] == "level")
        for node in nodes
        if not node["ignored"] and node["role"]["value"] == "heading"
    ]
    assert headings[:2] == [1, 2]
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))


def test_news_are_read_aloud_and_not_too_many(page: Tab, service: StandIn) -> None:
    live = "[...document.querySelectorAll('[role=status], [role=alert]')].map((e) => e.id)"
    assert set(page.run(live)) == {
        "service", "key-error", "captions-news", "captions-error", "images-error", "gallery-news", "gallery-error",
        "routes-error", "announcer",
    }  # fmt: skip
    page.run(
        """(() => { window.heard = []; new MutationObserver(() => {
        const text = document.getElementById("announcer").textContent; if (text) window.heard.push(text);
        }).observe(document.getElementById("announcer"), {childList: true}); })()"""
    )
    service.seconds_per_step = 0.06  # an announcement needs 50 ms
    service.queue = [1]
    generate(page, steps="16")
    page.wait("window.heard.some((text) => text.includes('ready'))")
    heard = page.run("window.heard")
    assert heard[-1] == "1 image is ready."
    assert 4 <= len(heard) <= 8, heard
    assert heard[0].startswith("Sent")
    assert heard[1].startswith("In the queue, place 1")


def test_motion_can_be_less(page: Tab, service: StandIn) -> None:
    service.hold("step 2")
    generate(page)
    page.wait_text("#running-text", "Step 1 of 8")
    animation = "getComputedStyle(document.getElementById('running-text'), '::before').animationName"
    assert page.run(animation) == "turn"
    page.media(prefers_reduced_motion="reduce")
    assert page.run(animation) == "none"
