"""serve/web in a real Chromium, against a stand-in service that tests make slow or faulty."""

import json
import re
from pathlib import Path

import pytest
from browser import Browser, Tab
from page_moves import HOSTILE, Clock, generate, wait_made, wait_until
from PIL import Image
from stand_in import WEB, Failure, StandIn, model, shape_png, standing_in

pytest_plugins = ("page_fixtures",)

GENERATE = "/v1/images/generations"


def told(page: Tab) -> list[list[str]]:
    """For each card: model, caption, model, caption, ..."""
    return page.each(".card", "[...e.querySelectorAll('dt, dd')].map((each) => each.textContent)")


# Captions


def test_every_captioner_side_by_side(page: Tab, service: StandIn, images: list[Path]) -> None:
    page.choose("#files", *images)
    page.wait_text("#captions-news", "Captioned: 3 of 3.")
    assert told(page) == [["resnet", service.captions["resnet"], "qformer", service.captions["qformer"]]] * 3
    left, right = page.each(".card:first-child dd", "e.getBoundingClientRect().toJSON()")
    assert left["y"] == right["y"]
    assert left["right"] <= right["left"]
    sent = {request.files[0] for request in service.asked("/v1/captions")}
    assert {data for _, data in sent} == {path.read_bytes() for path in images}
    assert page.each(".card h3", "e.textContent") == [p.name for p in images]
    page.wait("document.querySelector('.card img').naturalWidth === 300")


def test_dropped_anywhere_on_the_page(page: Tab, images: list[Path]) -> None:
    page.drop(900, 700, images[0])
    page.wait_text("#captions-news", "Captioned: 1 of 1.")
    page.drop(300, 140, images[1])
    page.wait("document.querySelectorAll('.card').length === 2")
    page.wait_text("#captions-news", "Captioned: 1 of 1.")
    source = page.run("document.querySelector('.card img').src")
    page.click("#captions-clear")
    assert told(page) == []
    assert page.run("document.activeElement.id") == "files"
    gone = "(() => { const i = new Image(); i.src = %s; return i.decode().then(() => false, () => true); })()"
    assert page.run(gone % json.dumps(source)), "the memory of an image that is gone is released"


def test_a_bad_image_does_not_spoil_the_others(page: Tab, service: StandIn, images: list[Path]) -> None:
    reason = "images[0]: broken image (no image format is recognised)"
    service.failures["/v1/captions"] = [Failure(422, reason, "images[0]")]
    page.choose("#files", images[0])
    page.wait_text("#captions-news", "Captioned: 0 of 1.")
    assert page.text("#captioned .error") == f"The service refused this request: {reason}."
    assert page.each("#captioned button", "e.textContent") == [], "the same file would be refused again"
    service.failures["/v1/captions"] = [Failure(500)]
    page.choose("#files", *images)
    page.wait_text("#captions-news", "Captioned: 2 of 3.")
    page.click("#captioned button")
    page.wait_text("#captions-news", "Captioned: 3 of 3.")
    assert len(told(page)) == 4


def test_slow_captions_count_and_can_be_cancelled(page: Tab, service: StandIn, images: list[Path]) -> None:
    service.hold("captions")
    clock = Clock(page)
    page.choose("#files", *images, *images[:2])
    page.wait_text("#captions-news", "Captioning: 0 of 5 done.")
    clock.forward(1)
    states = [*["Waiting for captions, 1 s"] * 4, "Waits for its turn"]
    wait_until(lambda: page.each(".card .state", "e.textContent") == states)
    wait_until(lambda: len(service.asked("/v1/captions")) == 4)
    page.run("document.getElementById('captions-cancel').focus()")
    page.press("Enter")
    page.wait_text("#captions-news", "Captioned: 0 of 5.")
    assert page.each(".card .error", "e.textContent") == ["Cancelled."] * 5
    assert page.run("document.activeElement.id") == "files", "the keyboard goes on where the button was"
    wait_until(lambda: service.disconnects == 4)
    assert len(service.asked("/v1/captions")) == 4, "no more than four at once"


def test_captions_wait_when_the_service_is_full(page: Tab, service: StandIn, images: list[Path]) -> None:
    service.failures["/v1/captions"] = [Failure(429, "queue is full", headers={"Retry-After": "1"})]
    clock = Clock(page)
    page.choose("#files", images[0])
    page.wait_text(".card", "this image goes again in 1 s")
    assert len(service.asked("/v1/captions")) == 1
    clock.forward(1)
    page.wait_text("#captions-news", "Captioned: 1 of 1.")
    assert len(service.asked("/v1/captions")) == 2


# Generated images


def test_progress_then_images(page: Tab, service: StandIn) -> None:
    service.queue = [2]
    service.hold("queue 2")
    clock = Clock(page)
    generate(page, number="2", seed="41", steps="4", guidance="2.5", negative="blur")
    page.wait_text("#running-text", "In the queue, place 2")
    assert not page.run("document.getElementById('bar').hasAttribute('value')"), "no share is known yet"
    service.hold("step 3")
    page.wait_text("#running-text", "Step 2 of 4")
    assert page.run("[document.getElementById('bar').value, document.getElementById('bar').max]") == [2, 4]
    assert page.run("document.getElementById('generate').ariaDisabled") == "true"
    assert page.text("#generate-why") == "One request at a time: this one is still running."
    clock.forward(1)
    page.wait_text("#running-text", "1 s so far")
    page.click("#generate")
    page.wait_text("#announcer", "One request at a time")
    service.release()
    wait_made(page, 2)
    (request,) = service.asked(GENERATE)
    assert request.json == {
        "model": "shapes64", "prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 2.5, "n": 2,
        "negative_prompt": "blur", "seed": 41, "response_format": "b64_json", "stream": True,
    }  # fmt: skip
    assert "shapes64 · 4 steps · guidance 2.5 · without “blur”" in page.text("#made")
    assert page.each("#made figure p", "e.textContent") == ["Seed 41", "Seed 42"]
    assert page.run("document.querySelector('#made img').alt") == "a red circle"
    assert page.run("getComputedStyle(document.querySelector('#made img')).imageRendering") == "pixelated"
    page.wait_text("#announcer", "2 images are ready.")
    assert page.run("document.getElementById('generate').ariaDisabled") == "false"
    assert page.text("#running") == page.text("#generate-why") == ""
    assert "does not know" not in page.text("#made")
    generate(page, "a zebra", number="8")
    page.wait_text("#made", "The model does not know: zebra.")
    generate(page, number="9")
    assert page.run("document.getElementById('number').validity.rangeOverflow"), "the service makes 8 at most"


def test_download_is_the_very_file(page: Tab, browser: Browser, tmp_path: Path) -> None:
    browser.call(
        "Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path), browserContextId=page.context
    )
    generate(page, "A red circle / über alles", seed="7")
    wait_made(page, 1)
    page.click("#made a[download]")
    file = tmp_path / "a-red-circle-über-alles-7.png"
    wait_until(file.exists)
    assert file.read_bytes() == shape_png("A red circle / über alles", 7)
    with Image.open(file) as image:
        assert image.text == {"prompt": "A red circle / über alles", "seed": "7"}  # type: ignore[attr-defined]


def test_seed_is_used_again(page: Tab, service: StandIn) -> None:
    generate(page)
    wait_made(page, 1)
    assert "seed" not in service.asked(GENERATE)[0].json
    page.click("#made figure button")
    assert page.run("[document.activeElement.id, document.activeElement.value]") == ["seed", "1000"]
    page.press("Enter")
    wait_made(page, 2)
    assert service.asked(GENERATE)[1].json["seed"] == 1000
    first, second = page.each("#made h3", "e.textContent")
    assert first == second == "a red circle"


def test_seeds_are_exact_to_the_last_bit(blank: Tab, service: StandIn) -> None:
    seed = 2**63 - 3  # larger than the service allows; as a JavaScript number it would be 2**63
    prompt = 'no seed: {"seed": 9007199254740993, "x\\"seed": 1}'
    service.sweep = [{"image_id": "one", "prompt": prompt, "seed": seed, "url": ""}]
    blank.goto(service.url)
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait("document.querySelectorAll('#swept img').length === 1")
    blank.click("#swept button")
    blank.fill("#number", "2")
    blank.click("#generate")
    wait_made(blank, 2)
    (request,) = service.asked(GENERATE)
    assert (request.json["seed"], request.json["prompt"]) == (seed, prompt)
    assert blank.each("#made figure p", "e.textContent") == [f"Seed {seed}", f"Seed {seed + 1}"]
    blank.fill("#seed", "0007")
    blank.click("#generate")
    wait_made(blank, 4)
    assert service.asked(GENERATE)[1].json["seed"] == 7
    blank.fill("#seed", "-1")
    blank.click("#generate")
    assert not blank.run("document.getElementById('seed').validity.valid")
    assert len(service.asked(GENERATE)) == 2


def test_cancel_ends_the_work(page: Tab, service: StandIn) -> None:
    service.hold("step 3")
    generate(page)
    page.wait_text("#running-text", "Step 2 of 8")
    page.run("document.getElementById('cancel').focus()")
    page.press(" ")
    page.wait_text("#images-error", "Cancelled.")
    wait_until(lambda: service.disconnects == 1)
    assert page.run("document.activeElement.id") == "generate"
    service.release()
    page.press("Enter")
    wait_made(page, 1)
    assert page.text("#images-error") == ""


@pytest.mark.parametrize(("piece_bytes", "line_end"), [(1, "\n"), (3, "\r\n"), (None, "\r\n")])
def test_stream_in_pieces(page: Tab, service: StandIn, piece_bytes: int | None, line_end: str) -> None:
    service.piece_bytes, service.line_end, service.cut = piece_bytes, line_end, "größer als möglich: 猫"
    generate(page)
    page.wait_text("#images-error", "The service gave up: größer als möglich: 猫.")
    service.cut = None
    page.click("#generate")
    wait_made(page, 1)


def test_another_model_brings_its_settings(blank: Tab, service: StandIn) -> None:
    other = model("codes", "generator")
    own = {"guidance_scale": 1.5, "guidance_scale_end": None, "temperature": 0.6, "top_k": 0, "top_p": 1.0}
    other["defaults"] = {**own, "size": "32x32"}
    service.models.append(other)
    blank.goto(service.url)
    blank.wait_text("#service", "2 generators")

    def fields() -> dict[str, str]:
        shown = "#images-form .fields input, #negative"
        return dict(blank.each(shown, "e.checkVisibility() ? [e.id, e.value] : ['hidden', '']"))

    always = {"number": "1", "seed": "", "hidden": ""}
    assert fields() == {"steps": "8", "guidance": "3", "negative": "", **always}
    blank.fill("#negative", "blur")
    select = "document.getElementById('model')"
    blank.run(f"{select}.value = 'codes', {select}.dispatchEvent(new Event('change'))")
    codes = {"guidance": "1.5", "guidance-end": "", "temperature": "0.6", "top-k": "0", "top-p": "1"}
    assert fields() == {**codes, **always}
    generate(blank, **{"top-p": "0.9"})
    wait_made(blank, 1)
    sent = service.asked(GENERATE)[0].json
    wanted = {"model": "codes", "prompt": "a red circle", "guidance_scale": 1.5, "temperature": 0.6, "top_k": 0}
    assert sent == {**wanted, "top_p": 0.9, "n": 1, "response_format": "b64_json", "stream": True}
    assert "codes · guidance 1.5 · temperature 0.6 · top-k all · top-p 0.9 ·" in blank.text("#made")
    # If the field is emptied, the end is "the same", as the page says, not the model's default.
    other["defaults"]["guidance_scale_end"] = 3.0
    blank.goto(service.url)
    blank.wait_text("#service", "2 generators")
    blank.run(f"{select}.value = 'codes', {select}.dispatchEvent(new Event('change'))")
    assert fields()["guidance-end"] == "3"
    generate(blank, **{"guidance-end": ""})
    wait_made(blank, 1)
    assert service.asked(GENERATE)[1].json["guidance_scale_end"] == 1.5
    service.failures[GENERATE] = [Failure(400, "top_p: 0: must be above 0", "top_p")]
    blank.click("#generate")
    blank.wait_text("#images-error", "top_p: 0: must be above 0")
    assert blank.run("document.activeElement.id") == "top-p"


# Errors in words


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (Failure(401, "no"), "The service needs a key. Enter a key"),
        # Not 408: Chromium repeats such a request on a kept connection.
        (Failure(415, "the body must be JSON"), "The service refused this request (415): the body must be JSON."),
        (Failure(413, "body: 12 MB, at most 8 MB"), "Too large for this service: body: 12 MB, at most 8 MB."),
        (Failure(422, "n: 99, at most 8.", "n"), "The service refused this request: n: 99, at most 8."),
        (Failure(429, "60 a minute"), "Too many requests at once: 60 a minute. Try again in a moment."),
        (Failure(503, ""), "The service is not ready. Try again in a moment."),
        (Failure(500, "", headers={"X-Request-Id": "r-17"}), "The service failed (500). Its log has more under r-17."),
        (Failure(502, body=b"<html>Bad Gateway</html>"), "The service failed (502)."),
        (Failure(422, HOSTILE), f"The service refused this request: {HOSTILE}."),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Failure) else "",
)
def test_refusal_in_words(page: Tab, service: StandIn, failure: Failure, words: str) -> None:
    service.failures[GENERATE] = [failure]
    generate(page, number="8")
    page.wait("document.getElementById('images-error').innerText")
    assert page.text("#images-error") == words
    if failure.param:
        assert page.run("[document.activeElement.id, document.activeElement.ariaInvalid]") == ["number", "true"]
    page.click("#generate")
    wait_made(page, 8)


def test_refusal_that_says_when_to_come_back(page: Tab, service: StandIn) -> None:
    service.failures[GENERATE] = [Failure(429, "the queue is full", headers={"Retry-After": "3"})]
    clock = Clock(page)
    generate(page)
    page.wait_text("#images-error", "Too many requests at once: the queue is full. Try again in 3 s.")
    page.click("#generate")
    page.wait_text("#announcer", "The service asked to wait: 3 s.")
    clock.forward(2.5)
    page.wait_text("#generate-why", "The service asked to wait: 1 s.")
    assert len(service.asked(GENERATE)) == 1
    clock.forward(0.5)
    page.wait("document.getElementById('generate').ariaDisabled === 'false'")
    page.click("#generate")
    wait_made(page, 1)
    assert len(service.asked(GENERATE)) == 2


@pytest.mark.parametrize("cut", ["broken", "ended"])
def test_connection_lost_on_the_way(page: Tab, service: StandIn, cut: str) -> None:
    service.cut = cut
    generate(page)
    page.wait_text("#images-error", "The connection broke off before")


def test_offline(page: Tab) -> None:
    page.network(offline=True)
    generate(page)
    page.wait_text("#images-error", "This device is offline.")
    page.network(offline=False)
    page.click("#generate")
    wait_made(page, 1)


def test_service_gone(browser: Browser, images: list[Path]) -> None:
    with standing_in() as stand_in:
        tab = browser.open(stand_in.url)
        tab.wait_text("#service", "Connected")
    generate(tab)
    tab.wait_text("#images-error", "The service does not answer: it does not run, or the network is gone.")
    tab.choose("#files", images[0])
    tab.wait_text(".card", "The service does not answer")
    tab.close()


def test_a_large_file_that_is_refused_unread(page: Tab, service: StandIn, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    large.write_bytes(bytes(12_000_000))
    # Chromium may repeat a request that broke off on a kept connection.
    service.failures["/v1/captions"] = [Failure(413, "at most 8 MB", unread=True)] * 9
    page.choose("#files", large)
    # Which one depends on whether the refusal arrives before the connection's end is seen.
    words = "/Too large for this service|12.0 MB sent are more than it takes/"
    page.wait(f"{words}.test(document.querySelector('.card').innerText)")


# Connecting and the key


def test_key_stays_in_this_tab(blank: Tab, service: StandIn, browser: Browser, images: list[Path]) -> None:
    service.key = "s3cret-key"
    blank.goto(service.url)
    blank.wait_text("#service", "The service needs a key.")
    assert blank.text("#generate-why") == "The service needs a key."
    options = "#images-form :is(input, textarea, select)"
    shown = ["prompt", "model", "number", "seed"]
    assert [id for id in blank.each(options, "e.checkVisibility() && e.id") if id] == shown, "no model is known"
    blank.choose("#files", images[0])
    blank.wait_text("#captions-error", "The service needs a key.")
    for key, words in [("wrong", "does not accept this key"), ("mit Umläuten", "cannot be a key")]:
        blank.fill("#key", key)
        blank.press("Enter")
        blank.wait_text("#key-error", words)
    blank.fill("#key", " s3cret-key ")
    blank.click("#use-key")
    blank.wait_text("#service", "Connected")
    assert blank.text("#key-form") == ""
    assert blank.run("document.getElementById('key').value") == ""
    assert blank.run("[Object.values(sessionStorage), localStorage.length, document.cookie, location.href]") == [
        ["s3cret-key"], 0, "", service.url,
    ]  # fmt: skip
    generate(blank)
    wait_made(blank, 1)
    assert service.asked(GENERATE)[0].headers["authorization"] == "Bearer s3cret-key"
    blank.goto(service.url)
    blank.wait_text("#service", "Connected")
    other = browser.open(service.url)
    other.wait_text("#service", "The service needs a key.")
    other.close()
    blank.click("#forget")
    blank.wait("document.activeElement.id === 'key'")
    assert blank.run("sessionStorage.length") == 0
    assert not blank.run("document.getElementById('steps').checkVisibility()")


def test_key_that_is_withdrawn(page: Tab, service: StandIn) -> None:
    service.key = "new"
    generate(page)
    page.wait_text("#images-error", "The service needs a key.")
    page.click("#images-error button")
    assert page.run("document.activeElement.id") == "key"
    page.type("new")
    page.press("Enter")
    page.wait("document.getElementById('key-form').hidden")
    page.click("#generate")
    wait_made(page, 1)


def test_waits_for_a_service_that_starts(blank: Tab, service: StandIn) -> None:
    service.failures["/v1/models"] = [Failure(503, "models load", headers={"Retry-After": "1"})]
    service.hold("models")
    clock = Clock(blank)
    blank.goto(service.url)
    blank.wait_text("#service", "The service is not ready: models load. Try again in 1 s.")
    assert blank.text("#generate-why") == blank.text("#service")
    clock.forward(1)
    blank.wait_text("#service", "Connecting…")
    service.release()
    blank.wait_text("#service", "Connected")
    assert len(service.asked("/v1/models")) == 2


def test_service_without_models(blank: Tab, service: StandIn, images: list[Path]) -> None:
    service.models, service.sweep = [], None
    blank.goto(service.url)
    blank.wait_text("#service", "Connected: no captioners, no generators.")
    assert blank.text("#generate-why") == "This service has no generator."
    blank.click("#generate")
    blank.wait_text("#announcer", "This service has no generator.")
    blank.choose("#files", images[0])
    blank.wait_text("#captions-error", "This service has no captioner.")
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait_text("#gallery-news", "Not found: this service was started without gallery=URI.")


# Safety: texts of the server stay text, and the page runs only its own files


def test_whatever_the_server_says_stays_text(blank: Tab, service: StandIn, images: list[Path]) -> None:
    service.models = [model(HOSTILE, "captioner"), model(HOSTILE, "generator")]
    service.captions = {HOSTILE: HOSTILE, "__proto__": HOSTILE}
    service.sweep = [{"image_id": HOSTILE, "prompt": HOSTILE, "seed": 1, "url": "javascript:alert(3)"}]
    service.failures[GENERATE] = [Failure(422, HOSTILE)]
    blank.goto(service.url)
    blank.wait_text("#service", "Connected")
    blank.choose("#files", *images)
    blank.wait_text("#captions-news", "Captioned: 3 of 3.")
    generate(blank, HOSTILE)
    blank.wait_text("#images-error", HOSTILE)
    blank.click("#generate")
    wait_made(blank, 1)
    blank.run("document.getElementById('gallery').scrollIntoView()")
    blank.wait("document.querySelectorAll('#swept img').length === 1")
    assert told(blank)[0] == [HOSTILE, HOSTILE, "__proto__", HOSTILE]
    assert blank.text("#made h3") == HOSTILE
    assert blank.run("document.querySelectorAll('img').length") == 3 + 1 + 1
    assert blank.run("document.scripts.length") == 1
    addresses = blank.each("[src], [href]", "e.getAttribute('src') ?? e.getAttribute('href')")
    assert all(re.match(r"(static/|blob:|#)", address) for address in addresses)


def test_policy_holds(page: Tab) -> None:
    markup = "(() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } })()"
    assert page.run(markup) == "TypeError", "trusted types: no text becomes markup"
    page.browser.events.clear()  # the test caused that violation


def test_files_are_plain() -> None:
    for path in WEB.iterdir():
        text = path.read_text()
        assert len(text.splitlines()) <= 500
        assert not re.search(r"https?://(?!html\.spec\.whatwg|www\.w3\.org/2000/svg)", text), path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|localStorage|cookie", text)
    html = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", html)
    assert not re.search(r"<(input|textarea|select)[^>]*\sname=", html)
