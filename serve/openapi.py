"""The routes and their fields as a document of OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0).

The fields are those of `serve/schemas.py`, with their limits, and the sampling options of the generators.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve import schemas
from serve.errors import in_bytes
from serve.limits import Limits
from serve.options import Told
from serve.parsing import UNREAD, Only, Strict

_JSON, _FORM = "application/json", "multipart/form-data"
_REF = "#/components/schemas/"
_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
UNREAD_FIELD = "Taken and not read; the answer names it under `ignored`."


@dataclass(frozen=True)
class Route:
    """What a person is told of a route."""

    summary: str
    answer: Any = None
    """An example of the answer in JSON; of another kind its media type, as text."""
    body: type[Strict] | None = None
    example: Mapping[str, Any] | None = None
    """A body that can be sent."""
    query: Mapping[str, str] = field(default_factory=dict)
    """What each field of the query is."""
    form: Mapping[str, str] = field(default_factory=dict)
    """What each field of a form is, where the route takes one as well."""
    status: int = 200


_MODEL = {"id": "images", "object": "model", "kind": "generator", "ready": True, "defaults": {"size": "64x64"}}
_IMAGES = {
    "created": 1795900000,
    "model": "images",
    "data": [{"b64_json": "iVBORw0...", "seed": 7}],
    "unknown_words": [],
}
_JOB = {"id": "job-ID", "status": "running", "progress": {"step": 8, "total": 64}, "error": None, "result": None}

ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/v1/models"): Route(
        "The models, with their options, defaults and limits.", {"object": "list", "data": [_MODEL]}
    ),
    ("GET", "/v1/models/{model}"): Route("One of the models.", _MODEL),
    ("POST", "/v1/captions"): Route(
        "Captions of several images by several captioners.",
        {"data": [{"index": 0, "captions": {"resnet": "a large red circle"}, "file_name": "circle.png"}]},
        schemas.CaptionsRequest,
        {"images": [_PIXEL]},
        form={"images": "Files; the field may be repeated.", "model": "Name of a captioner; may be repeated."},
    ),
    ("POST", "/v1/chat/completions"): Route(
        "The caption of one image, in the form of OpenAI's chat.",
        {
            "id": "chatcmpl-ID",
            "object": "chat.completion",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "a large red circle"}}],
        },
        schemas.ChatRequest,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": _PIXEL}}]}]},
    ),
    ("POST", "/v1/images/generations"): Route(
        "Images of a prompt, at once or as a stream of events. `unknown_words` are those that the model does not know.",
        _IMAGES,
        schemas.GenerationRequest,
        {"prompt": "a large red circle", "n": 2, "seed": 7},
    ),
    ("POST", "/v1/jobs"): Route(
        "Hands in a job: more images than one request makes, fetched later.",
        {"id": "job-ID", "status": "queued"},
        schemas.JobRequest,
        {"request": {"prompt": "a large red circle", "n": 16}},
        status=202,
    ),
    ("GET", "/v1/jobs/{job_id}"): Route(
        "How far a job is. Once it is done, `result` is as the answer of /v1/images/generations.", _JOB
    ),
    ("DELETE", "/v1/jobs/{job_id}"): Route("Cancels a job.", {**_JOB, "status": "cancelled"}),
    ("GET", "/v1/gallery"): Route(
        "A page of the images of a sweep, where the service shows one.",
        {"data": [{"image_id": "0", "prompt": "a red star", "seed": 7, "url": "/v1/gallery/0"}], "next": "60"},
        query={"limit": "How many images.", "cursor": "`next` of the page before."},
    ),
    ("GET", "/v1/gallery/{image_id}"): Route("One image of the sweep.", "image/png"),
    ("GET", "/metrics"): Route("Counters and times for Prometheus.", "text/plain"),
    ("GET", "/openapi.json"): Route("This document.", {"openapi": "3.1.0"}),
    ("GET", "/health"): Route("Whether the process lives.", {"status": "ok"}),
    ("GET", "/ready"): Route("Whether every model answers; 503 until then.", {"status": "ready"}),
    ("GET", "/"): Route("The page.", "text/html"),
    ("GET", "/static/{name}"): Route("The files of the page.", "text/plain"),
}


def document(options: Mapping[str, Told], limits: Limits, *, open_routes: Collection[str]) -> dict[str, Any]:
    """The document. `options`: those of each generator, by its name. `open_routes` need no key."""
    components: dict[str, Any] = {"Error": _error()}
    paths: dict[str, Any] = {}
    for (method, path), route in ROUTES.items():
        operation: dict[str, Any] = {"summary": route.summary, "responses": _responses(route)}
        places = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        parameters = [
            *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in places),
            *(
                {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
                for name, text in route.query.items()
            ),
        ]
        if parameters:
            operation["parameters"] = parameters
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": _content(route, components)}
        if path in open_routes:
            operation["security"] = []
        paths.setdefault(path, {})[method.lower()] = operation
    _limit(components, limits)
    generation = components["GenerationRequest"]["properties"]
    generation.update(_options(options, limits))
    components["JobRequest"]["properties"]["request"] = {
        "description": components["JobRequest"]["properties"]["request"]["description"],
        "$ref": f"{_REF}GenerationRequest",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mmcore",
            "version": "1",
            "description": "Captions of images, and images of prompts. The key is sent as Authorization: Bearer KEY. "
            "A field that may be left out may be null.",
        },
        "security": [{"key": []}],
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _responses(route: Route) -> dict[str, Any]:
    if isinstance(route.answer, str):
        content: dict[str, Any] = {route.answer: {}}
    else:
        content = {_JSON: {"schema": {"type": "object"}, "example": route.answer}}
    return {
        str(route.status): {"description": route.summary, "content": content},
        "default": {
            "description": "Refused. 429 and 503 say under Retry-After when to try again.",
            "content": {_JSON: {"schema": {"$ref": f"{_REF}Error"}}},
        },
    }


def _content(route: Route, components: dict[str, Any]) -> dict[str, Any]:
    """The body of a request, whose objects are put into `components`."""
    assert route.body is not None
    schema = route.body.model_json_schema(ref_template=f"{_REF}{{model}}")
    found = {**schema.pop("$defs", {}), route.body.__name__: schema}
    kinds = {kind.__name__: kind for kind in _kinds(Strict)}
    for name, each in found.items():
        components[name] = _told(each, kinds[name])
    content: dict[str, Any] = {_JSON: {"schema": {"$ref": f"{_REF}{route.body.__name__}"}, "example": route.example}}
    if route.form:
        properties: dict[str, Any] = {
            name: {"description": text, "type": "string"} for name, text in route.form.items()
        }
        properties["images"] = {
            "description": route.form["images"],
            "type": "array",
            "items": {"type": "string", "format": "binary"},
        }
        content[_FORM] = {"schema": {"type": "object", "required": ["images"], "properties": properties}}
    return content


def _kinds(kind: type[Strict]) -> list[type[Strict]]:
    return [kind, *(each for below in kind.__subclasses__() for each in _kinds(below))]


def _told(schema: dict[str, Any], kind: type[Strict]) -> dict[str, Any]:
    """pydantic's schema of an object, without its titles and nulls, and with what our marks say of a field."""
    schema.pop("title", None)
    for name, each in schema["properties"].items():
        schema["properties"][name] = each = _plain(each)
        marks = kind.model_fields[name].metadata
        if any(mark is UNREAD or isinstance(mark, Only) for mark in marks):
            each["x-no-effect"] = True
        if UNREAD in marks:
            each.setdefault("description", UNREAD_FIELD)
        for mark in marks:
            if isinstance(mark, Only):
                each.setdefault("description", f"{mark.why[:1].upper()}{mark.why[1:]}.")
                each["enum"] = list(mark.values)
    return schema


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema without its title, and without the null that stands for leaving it out."""
    schema = {name: value for name, value in schema.items() if name != "title" and (name, value) != ("default", None)}
    others = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(others) == 1:
        del schema["anyOf"]
        schema |= {name: value for name, value in others[0].items() if name not in schema}
    elif others:
        schema["anyOf"] = others
    return schema


def _limit(components: dict[str, Any], limits: Limits) -> None:
    """The limits of this service, at the fields that they are about."""
    generation, captions = components["GenerationRequest"]["properties"], components["CaptionsRequest"]["properties"]
    generation["prompt"] |= {"minLength": 1, "maxLength": limits.max_prompt_chars}
    generation["n"] |= {"minimum": 1, "maximum": limits.max_job_n}
    generation["n"]["description"] += f" At most {limits.max_n}, and {limits.max_job_n} in a job."
    captions["images"] |= {"minItems": 1, "maxItems": limits.max_images}
    size = in_bytes(min(limits.max_image_bytes, limits.max_data_uri_bytes))
    captions["images"]["description"] += f" Each has at most {size} and {limits.max_pixels / 1e6:g} megapixels."


def _options(options: Mapping[str, Told], limits: Limits) -> dict[str, Any]:
    """The sampling options of all generators; each says whose it is, and with which default."""
    most = limits.most_of_options()
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(option for told in options.values() for option in told):
        by_model = {model: told[name] for model, told in options.items() if name in told}
        defaults = ", ".join(f"{json.dumps(each['default'])} ({model})" for model, each in by_model.items())
        first = next(iter(by_model.values()))
        found[name] = {"description": f"Sampling option. Default: {defaults}.", "type": first["type"]}
        if "enum" in first:
            found[name]["enum"] = first["enum"]
        if name in most:
            found[name] |= {"minimum": 1, "maximum": most[name]}
    return found


def _error() -> dict[str, Any]:
    texts = {
        "message": "What is wrong, for a person.",
        "type": "The kind of refusal, as in OpenAI's API.",
        "param": "The field that is wrong, for a program.",
        "code": "The reason, for a program.",
    }
    properties = {name: {"type": ["string", "null"], "description": text} for name, text in texts.items()}
    return {"type": "object", "properties": {"error": {"type": "object", "properties": properties}}}
