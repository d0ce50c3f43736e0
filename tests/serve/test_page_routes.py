"""The list of routes of serve/web in a real Chromium, against a stand-in for the service."""

from browser import Tab
from stand_in import Failure, StandIn

pytest_plugins = ("page_fixtures",)


def test_the_routes_are_shown_once_they_are_opened(page: Tab, service: StandIn) -> None:
    assert service.asked("/openapi.json") == []
    service.failures["/openapi.json"] = [Failure(503, "not now")]
    page.click("#routes-all > summary")
    page.wait_text("#routes-error", "The service is not ready: not now.")
    page.click("#routes-all > summary")
    page.click("#routes-all > summary")
    page.wait("document.querySelectorAll('.route').length > 10")
    assert page.text("#routes-error") == ""
    titles = page.each(".route > summary code", "e.textContent")
    assert {"POST /v1/captions", "GET /v1/jobs/{job_id}", "GET /openapi.json"} <= set(titles)
    place = titles.index("POST /v1/images/generations") + 1
    page.click(f".route:nth-child({place}) > summary")
    told = page.text(f".route:nth-child({place})")
    # Chromium breaks lines where it likes.
    words = " ".join(told.split())
    assert "prompt text, required What the image shows." in words
    assert "n whole number, 1 to 64, by default 1 How many images;" in words
    assert 'response_format "b64_json" or "url"' in words
    assert "without effect: quality, background," in words
    assert f"{service.url}v1/images/generations" in words
    assert len(service.asked("/openapi.json")) == 2


def test_the_key_goes_with_it(blank: Tab, service: StandIn) -> None:
    service.key = "a-key-that-is-long-enough"
    blank.goto(service.url)
    blank.wait("!document.getElementById('key-form').hidden")
    blank.click("#routes-all > summary")
    blank.wait_text("#routes-error", "The service needs a key.")
    blank.fill("#key", service.key)
    blank.click("#use-key")
    blank.wait_text("#service", "Connected")
    blank.click("#routes-all > summary")
    blank.click("#routes-all > summary")
    blank.wait("document.querySelectorAll('.route').length > 10")
    (asked,) = [each for each in service.asked("/openapi.json") if "authorization" in each.headers]
    assert asked.headers["authorization"] == f"Bearer {service.key}"
