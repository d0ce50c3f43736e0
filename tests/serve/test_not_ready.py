"""A model that is dead or still loading does not affect others, in the routes and on the page."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Tab
from page_moves import generate, wait_made, wait_until
from serving import Served, data_uri, error, picture, run
from stand_in import StandIn

from serve import clients
from serve.clients import model_unavailable

pytest_plugins = ("page_fixtures",)

RED = {"images": [data_uri(picture("red"))]}


class Loading:
    """Answers once its model is loaded, which never happens."""

    async def call(self, method: str, *args: Any) -> Any:
        await asyncio.Event().wait()


class Dead:
    async def call(self, method: str, *args: Any) -> Any:
        raise model_unavailable()


class Faulty:
    """Its metadata works, but its model fails."""

    def __init__(self, healthy: Any) -> None:
        self._healthy = healthy

    async def call(self, method: str, *args: Any) -> Any:
        if method == "caption":
            raise RuntimeError("no memory left on the device")
        return await self._healthy.call(method, *args)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "TOLD_TIMEOUT_S", 0.2)


def asked(served: Served, *requests: tuple[str, str, Any]) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        async with served.client() as client:
            return [await client.request(method, path, json=body) for method, path, body in requests]

    return run(main())


@pytest.mark.parametrize("replica", [Loading(), Dead()])
def test_models_are_listed_whatever_one_of_them_does(replica: Any) -> None:
    served = Served()
    served.service.front.models["others"].replica = replica
    (response,) = asked(served, ("GET", "/v1/models", None))
    words, others, shapes = response.json()["data"]
    assert (words["ready"], others["ready"], shapes["ready"]) == (True, False, True)
    assert (others["id"], others["kind"], others["object"]) == ("others", "captioner", "model")
    assert set(others) == set(words)


def test_of_a_model_that_died_is_listed_what_it_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "_INFO_AGE_S", 0.0)
    served = Served()
    front = served.service.front

    async def main() -> tuple[Any, Any]:
        async with served.client() as client:
            before = (await client.get("/v1/models")).json()["data"][2]
            front.models["shapes"].replica = Dead()  # type: ignore[assignment]
            return before, (await client.get("/v1/models")).json()["data"][2]

    before, after = run(main())
    assert after == {**before, "ready": False}
    assert before["ready"] is True


@pytest.mark.parametrize("replica", [Loading(), Dead(), None])
def test_captions_of_the_others_come(replica: Any) -> None:
    served = Served()
    model = served.service.front.models["others"]
    model.replica = replica or Faulty(model.replica)  # type: ignore[assignment]
    (response,) = asked(served, ("POST", "/v1/captions", RED))
    assert response.status_code == 200
    (row,) = response.json()["data"]
    assert row["captions"] == {"words": "a red picture"}
    assert set(row["errors"]) == {"others"}
    assert row["errors"]["others"]["code"] == ("fault" if replica is None else "model_unavailable")
    assert not any(served.service.front.admission.held.values())


@pytest.mark.parametrize("replica", [Loading(), Dead(), None])
def test_where_every_captioner_fails_it_is_an_error(replica: Any) -> None:
    served = Served()
    for name in ("words", "others"):
        model = served.service.front.models[name]
        model.replica = replica or Faulty(model.replica)  # type: ignore[assignment]
    (response,) = asked(served, ("POST", "/v1/captions", RED))
    expected = (500, "fault") if replica is None else (503, "model_unavailable")
    assert (response.status_code, error(response)["code"]) == expected


# The page


def test_the_page_works_with_the_models_that_are_ready(blank: Tab, service: StandIn, images: list[Path]) -> None:
    resnet, qformer, shapes = service.models
    late = {**shapes, "id": "late", "resolution": None, "defaults": None, "ready": False}
    service.models = [resnet, {**qformer, "ready": False}, {**shapes, "ready": True}, late]
    service.captions = {"resnet": "a dog"}
    service.caption_errors = {"qformer": {"message": "the model is not available now; try again"}}
    blank.goto(service.url)
    blank.wait_text("#service", "Connected: 2 captioners, 2 generators. Not ready: qformer, late.")
    blank.choose("#files", images[0])
    blank.wait_text("#captions-news", "Captioned: 1 of 1.")
    cells = blank.each(".card dt, .card dd", "e.textContent")
    assert cells == ["resnet", "a dog", "qformer", "No caption: the model is not available now; try again."]
    assert blank.each("#model option", "e.value") == ["shapes64"]
    blank.fill("#steps", "3")
    # It becomes ready while the page is in use, and the settings are kept.
    service.models = [resnet, qformer, shapes, {**shapes, "id": "late"}]
    wait_until(lambda: len(blank.each("#model option", "e.value")) == 2)
    blank.wait_text("#service", "Connected: 2 captioners, 2 generators.")
    assert blank.run("document.getElementById('steps').value") == "3"
    generate(blank)
    wait_made(blank, 1)


def test_the_page_says_what_is_not_ready_where_nothing_else_is_there(
    blank: Tab, service: StandIn, images: list[Path]
) -> None:
    service.models = [{**each, "ready": False} for each in service.models[1:]]
    blank.goto(service.url)
    blank.wait_text("#service", "Connected: 1 captioner, 1 generator. Not ready: qformer, shapes64.")
    assert blank.text("#generate-why") == "No generator is ready yet: shapes64."
    blank.choose("#files", images[0])
    blank.wait_text("#captions-error", "No captioner is ready yet: qformer.")
