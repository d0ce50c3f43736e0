"""What the routes take and what they answer. A field that is unknown, or not supported here, is refused by its name."""

import json
import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mmcore.seeding import MAX_IMAGE_SEED
from serve.errors import ApiError, bad_value, quoted
from serve.limits import Limits

# A body that means more values than this is an attack on the parser: images are few and long.
_MAX_JSON_VALUES = 2000
# Control characters but tab and line breaks, and halves of surrogate pairs, which no tokenizer can be given.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

# Of what pydantic says, which repeats some values whole.
_MAX_REASON = 300

_T = TypeVar("_T", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _unset_nulls(cls, value: Any) -> Any:
        """A null asks for nothing, as in OpenAI's schema, where most of what may be left out may be null too."""
        if not isinstance(value, dict):
            return value
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: each for name, each in value.items() if each is not None or name in required}


class GenerationRequest(_Strict):
    """POST /v1/images/generations."""

    prompt: str
    model: str | None = None
    n: int = 1
    size: str | None = None
    seed: int | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    stream: bool = False


class JobRequest(_Strict):
    """POST /v1/jobs."""

    request: GenerationRequest


class _ImageUrl(_Strict):
    url: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


class TextPart(_Strict):
    type: Literal["text"]
    text: str


def _with_short_type(part: Any) -> Any:
    """pydantic repeats an unknown type whole in its error, in several copies; of megabytes that is slow."""
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str | list | dict):
        return part
    return {**part, "type": kind[:_MAX_REASON] if isinstance(kind, str) else f"a {type(kind).__name__}"}


_Part = Annotated[ImagePart | TextPart, Field(discriminator="type"), BeforeValidator(_with_short_type)]


class Message(_Strict):
    role: Literal["user"]
    content: str | list[_Part]


class ChatRequest(_Strict):
    """POST /v1/chat/completions: one message with one image.

    Text may stand beside the image, as in the requests of most programs. No captioner reads it: the answer is the
    caption that the image has without it, and names the text under `ignored`.
    """

    messages: list[Message]
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: Literal[False] = False


class CaptionsRequest(_Strict):
    """POST /v1/captions as JSON."""

    images: list[str]
    models: list[str] | None = None


@dataclass(frozen=True)
class GenerateWork:
    """What a generator is asked for, every default filled in: image i is made of the prompt and ``seeds[i]``."""

    prompt: str
    seeds: tuple[int, ...]
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None
    request_id: str = ""
    """Of the request that asked for it, for the logs."""


def _has_more_marks(body: bytes | bytearray, most: int) -> bool:
    """Whether more than `most` values can be in a body. `find` leaps over an image in base64 ten times as fast as
    `count` goes through it."""
    found = 0
    for mark in (b",", b"[", b"{", b":"):
        place = body.find(mark)
        while place >= 0 and found <= most:
            found, place = found + 1, body.find(mark, place + 1)
    return found > most


def parse_json(body: bytes | bytearray) -> Any:
    """The value of a JSON body, with no number that JSON does not have and no key twice. Raises ApiError.

    A bytearray is emptied: beside a body of megabytes its text and its values take as much again.
    """

    def refuse_constant(name: str) -> Any:
        raise ApiError(400, f"{name} is no number of JSON", code="invalid_json")

    def refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
            raise ApiError(400, f"the field {quoted(twice)} stands there twice", param=twice[:64], code="invalid_json")
        return fields

    # Parsing holds the interpreter, and a body of nothing but commas would hold it for seconds.
    if _has_more_marks(body, _MAX_JSON_VALUES):
        raise ApiError(400, f"more than {_MAX_JSON_VALUES} values in the body", code="invalid_json")
    try:
        text = body.decode()
        if isinstance(body, bytearray):
            body.clear()
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is no UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from None


def parse(kind: type[_T], value: Any) -> _T:
    """Build a request. Raises ApiError that names the first field that is wrong."""
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        # An unknown field first: it is often the cause of what else is wrong. Then the deepest: of the branches of a
        # union it is the one that was meant.
        detail = min(
            error.errors(include_url=False),
            key=lambda each: (each["type"] != "extra_forbidden", -len(each["loc"])),
        )
        # A union's branch is no part of the path that the client knows.
        tags = {"image_url", "text"}
        path = [str(part) for i, part in enumerate(detail["loc"]) if not (part in tags and _is_tag(detail["loc"], i))]
        path = [part for part in path if part != "str" and not part.startswith("list[")]
        param = ".".join(path)[:200]
        if detail["type"] == "extra_forbidden":
            known = ", ".join(kind.model_fields)
            message = f"unknown or unsupported field {quoted(param)}; {kind.__name__} has {known}"
            raise ApiError(400, message, param=param, code="unknown_field") from None
        message = f"{param}: {detail['msg'][:1].lower()}{detail['msg'][1:_MAX_REASON]}"
        if isinstance(detail["input"], str | int | float | bool | None):
            message += f", got {quoted(detail['input'])}"
        raise ApiError(400, message, param=param, code="invalid_value") from None


def _is_tag(path: tuple[int | str, ...], index: int) -> bool:
    """Whether part `index` of an error's path is the branch of a union: it follows the number of a list's element."""
    return index > 0 and isinstance(path[index - 1], int)


def check_prompt(text: str, limits: Limits, param: str) -> None:
    if len(text) > limits.max_prompt_chars:
        raise bad_value(param, f"{len(text)} characters; at most {limits.max_prompt_chars}")
    if found := _UNPRINTABLE.search(text):
        raise bad_value(param, f"character U+{ord(found.group()):04X} at {found.start()} is none of a text")


def generate_work(
    request: GenerationRequest, info: dict[str, Any], limits: Limits, max_n: int, request_id: str = ""
) -> GenerateWork:
    """The request with the model's defaults filled in and every range checked. Raises ApiError.

    `info`: the model as GET /v1/models describes it.
    """
    defaults, resolution = info["defaults"], info["resolution"]
    check_prompt(request.prompt, limits, "prompt")
    if not request.prompt.strip():
        raise bad_value("prompt", "is empty")
    if not 1 <= request.n <= max_n:
        raise bad_value("n", f"{quoted(request.n)} images; from 1 to {max_n}")
    if request.size is not None and request.size != defaults["size"]:
        message = f"{quoted(request.size)}; the model {info['id']!r} makes images of {resolution}x{resolution}"
        raise bad_value("size", message)
    steps = defaults["num_inference_steps"] if request.num_inference_steps is None else request.num_inference_steps
    if not 1 <= steps <= limits.max_steps:
        raise bad_value("num_inference_steps", f"{quoted(steps)}; from 1 to {limits.max_steps}")
    guidance = defaults["guidance_scale"] if request.guidance_scale is None else request.guidance_scale
    # JSON has no NaN, but 1e999 is read as infinity.
    if not (math.isfinite(guidance) and 1 <= guidance <= limits.max_guidance_scale):
        raise bad_value("guidance_scale", f"{guidance}; from 1 (none) to {limits.max_guidance_scale:g}")
    if request.negative_prompt is not None:
        check_prompt(request.negative_prompt, limits, "negative_prompt")
        if guidance == 1:
            raise bad_value(
                "negative_prompt", "works by guidance, and a guidance_scale of 1 is none; give a larger one"
            )
    seed = secrets.randbelow(MAX_IMAGE_SEED - request.n) if request.seed is None else request.seed
    if not 0 <= seed <= MAX_IMAGE_SEED - request.n:
        raise bad_value("seed", f"{quoted(seed)}; from 0 to {MAX_IMAGE_SEED - request.n}")
    seeds = tuple(range(seed, seed + request.n))
    return GenerateWork(request.prompt, seeds, steps, float(guidance), request.negative_prompt, request_id)


def image_of_chat(request: ChatRequest) -> tuple[str, str, list[str]]:
    """The one image of a chat, as a data URI; where it stands; and where the texts stand that nobody reads.

    Raises ApiError for a chat without an image, or with several.
    """
    if len(request.messages) != 1:
        raise bad_value("messages", f"{len(request.messages)} messages; a captioner takes one, with one image")
    content = request.messages[0].content
    if isinstance(content, str):
        raise bad_value("messages.0.content", "text alone; a captioner takes an image (a part of type image_url)")
    places = [f"messages.0.content.{index}" for index in range(len(content))]
    pairs = list(zip(places, content, strict=True))
    images = [(part.image_url.url, f"{place}.image_url.url") for place, part in pairs if isinstance(part, ImagePart)]
    if len(images) != 1:
        raise bad_value("messages.0.content", f"{len(images)} images; a captioner takes one (POST /v1/captions many)")
    return *images[0], [f"{place}.text" for place, part in pairs if isinstance(part, TextPart)]


def chat_answer(request_id: str, model: str, caption: str, max_words: int, ignored: list[str]) -> dict[str, Any]:
    """`ignored`: fields of the request that had no part in the answer, which says so itself.

    A caption of `max_words` was cut there: whether it would have ended there of itself nobody knows.
    """
    num_words = len(caption.split())
    return {
        **({"ignored": ignored} if ignored else {}),
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": caption, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop" if num_words < max_words else "length",
            }
        ],
        "usage": {"prompt_tokens": 0, "completion_tokens": num_words, "total_tokens": num_words},
    }


def generation_answer(work: GenerateWork, model: str, created: int, images: list[dict[str, str]]) -> dict[str, Any]:
    """`images`: ``{"b64_json": ...}`` or ``{"url": ...}`` for each seed."""
    data = [{**image, "seed": seed, "revised_prompt": None} for image, seed in zip(images, work.seeds, strict=True)]
    return {"created": created, "data": data, "model": model}


def completed_events(answer: dict[str, Any], size: str | None) -> list[dict[str, Any]]:
    """The events by which OpenAI's clients know that an image is there, of an answer; one for each image."""
    about = {"created_at": answer["created"], "size": size}
    fixed = {"background": "opaque", "output_format": "png", "quality": "auto"}
    return [{"type": "image_generation.completed", **about, **fixed, **image} for image in answer["data"]]
