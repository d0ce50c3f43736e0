"""serve/openapi.py: it names every route, its fields are those that the routes take, and its examples work."""

from typing import Any

import jsonschema
import pytest
from serving import Served, picture, request, run, write_sweep

from mmcore.storage import Storage
from serve import openapi
from serve.limits import Limits
from serve.routes import OPEN_ROUTES

# The name that an example gives a model, and what that is called here.
PLACES = {"{model}": "shapes", "{job_id}": "JOB", "{image_id}": "a", "{name}": "app.js"}


def served_document(limits: Limits | None = None) -> dict[str, Any]:
    return request("GET", "/openapi.json", Served(limits=limits)).json()


def validator(document: dict[str, Any], name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_every_route_is_told_and_no_other() -> None:
    routes = Served().service._router.routes
    there = {(method, route.path) for route in routes for method in route.methods - {"HEAD"}}  # type: ignore
    assert set(openapi.ROUTES) == there
    document = served_document()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert told == there
    without_key = {path for path, methods in document["paths"].items() if methods.get("get", {}).get("security") == []}
    assert without_key == set(OPEN_ROUTES)


def test_examples_can_be_sent_and_answers_have_the_fields_that_are_told(tmp_path: Any) -> None:
    write_sweep(tmp_path, {"a": picture()})

    async def main() -> None:
        async with Served(gallery=Storage(str(tmp_path))).client() as client:
            document = (await client.get("/openapi.json")).json()
            job = ""
            for (method, path), route in openapi.ROUTES.items():
                place = path
                for name, value in {**PLACES, "{job_id}": job}.items():
                    place = place.replace(name, value)
                response = await client.request(method, place, **({"json": route.example} if route.example else {}))
                assert response.status_code == route.status, (method, path, response.text)
                if isinstance(route.answer, str):
                    assert response.headers["content-type"].startswith(route.answer if "static" not in path else "text")
                    continue
                answer = response.json()
                job = answer["id"] if path == "/v1/jobs" else job
                assert told_fields(route.answer) <= told_fields(answer), (method, path)
                if route.body is not None:
                    validator(document, route.body.__name__).validate(route.example)

    run(main())


def told_fields(answer: Any, place: str = "") -> set[str]:
    """Where the fields of an answer stand, without what is named by models, and without what only some jobs have."""
    if isinstance(answer, list):
        return told_fields(answer[0], f"{place}.0") if answer else set()
    if not isinstance(answer, dict) or place.endswith((".captions", ".defaults", ".progress")):
        return {place}
    return {place}.union(*(told_fields(value, f"{place}.{name}") for name, value in answer.items()))


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ({"prompt": "x"}, True),
        ({"prompt": "x", "num_inference_steps": 240, "sampler": "ddim", "user": "me", "quality": "auto"}, True),
        ({"n": 1}, False),
        ({"prompt": "x", "n": 0}, False),
        ({"prompt": "x", "num_inference_steps": 251}, False),
        ({"prompt": "x", "sampler": "me"}, False),
        ({"prompt": "x", "quality": "hd"}, False),
        ({"prompt": "x", "cfg": 3}, False),
        ({"prompt": 3}, False),
    ],
)
def test_the_schema_takes_what_the_route_takes(body: dict[str, Any], good: bool) -> None:
    assert validator(served_document(), "GenerationRequest").is_valid(body) == good
    assert (request("POST", "/v1/images/generations", json=body).status_code != 400) == good


def test_the_document_holds_together() -> None:
    document = served_document(Limits(max_job_n=9, max_n=3, max_images=5))
    schemas = document["components"]["schemas"]
    jsonschema.Draft202012Validator.check_schema({"$defs": schemas})
    assert schemas["GenerationRequest"]["properties"]["n"]["maximum"] == 9
    assert "At most 3, and 9 in a job." in schemas["GenerationRequest"]["properties"]["n"]["description"]
    assert schemas["CaptionsRequest"]["properties"]["images"]["maxItems"] == 5
    refs = {text for text in _texts(document) if text.startswith("#/")}
    assert refs
    assert {ref.removeprefix("#/components/schemas/") for ref in refs} <= set(schemas)
    for name, schema in schemas.items():
        for field, told in schema["properties"].items():
            assert told.get("description") or field in ("type", "image_url", "error"), f"{name}.{field}: no description"


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _texts(each)]
    if isinstance(value, list):
        return [text for each in value for text in _texts(each)]
    return [value] if isinstance(value, str) else []


def test_what_only_some_models_or_requests_read_is_not_told_to_have_no_effect() -> None:
    schemas = served_document()["components"]["schemas"]
    assert "x-no-effect" not in schemas["TextPart"]["properties"]["text"]
    chat = schemas["ChatRequest"]["properties"]
    assert {name for name in ("stream", "stream_options", "max_tokens", "user") if "x-no-effect" in chat[name]} == {
        "user"
    }


def test_a_generator_that_does_not_answer_is_left_out() -> None:
    document = openapi.document({}, Limits(), open_routes=OPEN_ROUTES)
    assert "num_inference_steps" not in document["components"]["schemas"]["GenerationRequest"]["properties"]
