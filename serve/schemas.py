"""What the routes take and what they answer.

Clients send much that changes nothing here, often because it is OpenAI's default. A value that asks for what is done
anyway is taken. A field that nobody reads is taken too, and the answer names it under `ignored`. Whatever would change
the answer and cannot be done is refused by its name.
"""

import math
import re
import secrets
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmcore.seeding import MAX_IMAGE_SEED
from serve.errors import bad_value, quoted
from serve.limits import Limits
from serve.parsing import MAX_REASON, UNREAD, Strict, only, unread_fields

# Control characters but tab and line breaks, and halves of surrogate pairs, which no tokenizer can be given.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

_UnreadText = Annotated[str | None, UNREAD]
_UnreadObject = Annotated[dict[str, Any] | None, UNREAD]
# Of a choice among words: the search for a caption draws none.
_UnreadNumber = Annotated[float | None, Field(ge=0), UNREAD]
_NoTools = only([], why="a captioner calls no tools; leave it out")
_NoToolChoice = only("none", "auto", why="a captioner calls no tools; leave it out")
_TEXT_ONLY = "a caption is text; leave it out"
_NO_LOGPROBS = "captions come without probabilities; leave it out"
_NO_PENALTY = "the search for a caption has no penalties; leave it out"


class GenerationRequest(Strict):
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
    quality: Annotated[str | None, only("auto", "standard", why="images have one quality; leave it out")] = None
    background: Annotated[str | None, only("auto", "opaque", why="images have no transparency; leave it out")] = None
    output_format: Annotated[str | None, only("png", why="images are PNG; leave it out")] = None
    output_compression: Annotated[int | None, only(100, why="a PNG loses nothing; leave it out"), UNREAD] = None
    partial_images: Annotated[int | None, only(0, why="no image comes before it is finished; leave it out")] = None
    style: Annotated[str | None, only("vivid", why="images have one style; leave it out"), UNREAD] = None
    moderation: Annotated[Literal["auto", "low"] | None, UNREAD] = None
    user: _UnreadText = None
    safety_identifier: _UnreadText = None


class JobRequest(Strict):
    """POST /v1/jobs."""

    request: GenerationRequest


class _ImageUrl(Strict):
    url: str
    detail: Annotated[str | None, only("auto", why="a captioner sees every image at one size; leave it out")] = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl
    prompt_cache_breakpoint: _UnreadObject = None


class TextPart(Strict):
    type: Literal["text"]
    text: Annotated[str, UNREAD]
    prompt_cache_breakpoint: _UnreadObject = None


def _with_short_type(part: Any) -> Any:
    """pydantic repeats an unknown type whole in its error, in several copies; of megabytes that is slow."""
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str | list | dict):
        return part
    return {**part, "type": kind[:MAX_REASON] if isinstance(kind, str) else f"a {type(kind).__name__}"}


_Part = Annotated[ImagePart | TextPart, Field(discriminator="type"), BeforeValidator(_with_short_type)]


class Message(Strict):
    role: Literal["user", "system", "developer"]
    content: str | list[_Part]
    name: _UnreadText = None


class ChatRequest(Strict):
    """POST /v1/chat/completions: a message of the user with one image, and what programs send along.

    Text may stand beside the image, and messages of the system before it. No captioner reads them: the answer is the
    caption that the image has without them.
    """

    messages: list[Message]
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stream: Annotated[bool | None, only(False, why="a caption comes at once; leave it out")] = None
    stream_options: _UnreadObject = None
    n: Annotated[int | None, only(1, why="an image has one caption; give 1")] = None
    temperature: _UnreadNumber = None
    top_p: _UnreadNumber = None
    top_k: Annotated[int | None, UNREAD] = None
    seed: Annotated[int | None, UNREAD] = None
    presence_penalty: Annotated[float | None, only(0, why=_NO_PENALTY)] = None
    frequency_penalty: Annotated[float | None, only(0, why=_NO_PENALTY)] = None
    stop: Annotated[str | list[str] | None, only([], why="a caption ends by itself; leave it out")] = None
    logit_bias: Annotated[dict[str, float] | None, only({}, why="words have no weights; leave it out")] = None
    logprobs: Annotated[bool | None, only(False, why=_NO_LOGPROBS)] = None
    top_logprobs: Annotated[int | None, only(0, why=_NO_LOGPROBS)] = None
    response_format: Annotated[dict[str, Any] | None, only({"type": "text"}, why=_TEXT_ONLY)] = None
    modalities: Annotated[list[str] | None, only(["text"], why=_TEXT_ONLY)] = None
    tools: Annotated[list[Any] | None, _NoTools] = None
    tool_choice: Annotated[str | dict[str, Any] | None, _NoToolChoice] = None
    parallel_tool_calls: Annotated[bool | None, UNREAD] = None
    functions: Annotated[list[Any] | None, _NoTools] = None
    function_call: Annotated[str | dict[str, Any] | None, _NoToolChoice] = None
    verbosity: Annotated[str | None, only("medium", why="a captioner has one manner; leave it out")] = None
    store: Annotated[bool | None, only(False, why="no answer is kept; leave it out")] = None
    reasoning_effort: _UnreadText = None
    metadata: _UnreadObject = None
    service_tier: _UnreadText = None
    prediction: _UnreadObject = None
    prompt_cache_key: _UnreadText = None
    prompt_cache_options: _UnreadObject = None
    prompt_cache_retention: _UnreadText = None
    safety_identifier: _UnreadText = None
    user: _UnreadText = None


class CaptionsRequest(Strict):
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
    size: str | None = None
    """WIDTHxHEIGHT, as the answer says it."""
    ignored: tuple[str, ...] = ()
    """Fields of the request that have no part in it, as the answer says them."""


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
    if request.size not in (None, "auto", defaults["size"]):
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
    return GenerateWork(
        request.prompt,
        seeds,
        steps,
        float(guidance),
        request.negative_prompt,
        request_id,
        defaults["size"],
        tuple(unread_fields(request)),
    )


def image_of_chat(request: ChatRequest) -> tuple[str, str, list[str]]:
    """The one image of a chat, as a data URI; where it stands; and what stands in the request that nobody reads.

    Raises ApiError for a chat without an image, with several, or with several messages of the user.
    """
    users = [index for index, message in enumerate(request.messages) if message.role == "user"]
    if len(users) != 1:
        raise bad_value("messages", f"{len(users)} messages of the user; a captioner takes one, with one image")
    param = f"messages.{users[0]}.content"
    if isinstance(request.messages[users[0]].content, str):
        raise bad_value(param, "text alone; a captioner takes an image (a part of type image_url)")
    images: list[tuple[str, str]] = []
    ignored = unread_fields(request)
    for number, message in enumerate(request.messages):
        parts = [] if isinstance(message.content, str) else message.content
        places = [(index, part) for index, part in enumerate(parts) if isinstance(part, ImagePart)]
        if message.role == "user":
            images = [(part.image_url.url, f"{param}.{index}.image_url.url") for index, part in places]
        elif places:
            where = f"messages.{number}.content.{places[0][0]}"
            raise bad_value(where, f"an image of the {message.role}; give it in the user's message")
        else:
            ignored = [*(each for each in ignored if not each.startswith(f"messages.{number}.")), f"messages.{number}"]
    if len(images) != 1:
        raise bad_value(param, f"{len(images)} images; a captioner takes one (POST /v1/captions many)")
    return *images[0], ignored


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
    about = {"created": created, "model": model, "size": work.size, "background": "opaque", "output_format": "png"}
    return {**about, "data": data, **({"ignored": list(work.ignored)} if work.ignored else {})}


def completed_events(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The events by which OpenAI's clients know that an image is there, of an answer; one for each image."""
    about = {name: answer[name] for name in ("size", "background", "output_format")}
    about |= {"type": "image_generation.completed", "created_at": answer["created"], "quality": "auto"}
    return [{**about, **image} for image in answer["data"]]
