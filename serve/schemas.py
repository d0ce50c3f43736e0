"""The fields of requests and answers.

Clients send much that changes nothing here, often because it is OpenAI's default. A value that asks for the usual is
taken. A field that is not read is taken too, and the answer names it under `ignored`. A field that would change the
answer, and cannot be followed, is refused by its name.
"""

import re
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mmcore.seeding import MAX_IMAGE_SEED
from serve.errors import ApiError, bad_value, quoted
from serve.limits import Limits
from serve.options import asked_options
from serve.parsing import MAX_REASON, SOMETIMES_READ, UNREAD, Strict, check_text, only, unread_fields

if TYPE_CHECKING:
    from serve.generator import GeneratorInfo

# WIDTHxHEIGHT.
_SIZE = re.compile(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})")

_UnreadText = Annotated[str | None, UNREAD]
_UnreadObject = Annotated[dict[str, Any] | None, UNREAD]
# For drawing words at random, which the search for a caption does not do.
_UnreadNumber = Annotated[float | None, Field(ge=0), UNREAD]
_NoTools = only([], why="a captioner calls no tools; leave it out")
_NoToolChoice = only("none", "auto", why="a captioner calls no tools; leave it out")
_TEXT_ONLY = "a caption is text; leave it out"
_NO_LOGPROBS = "captions come without probabilities; leave it out"
_NO_PENALTY = "the search for a caption has no penalties; leave it out"


class GenerationRequest(Strict):
    """POST /v1/images/generations, without the options of the model that is asked (``options.with_options``)."""

    prompt: str
    """What the image shows."""
    model: str | None = None
    """Name of a generator; by default the first one of the service."""
    n: int = 1
    """How many images; image i has the seed `seed` + i."""
    size: str | None = None
    """auto, which is the model's own, or WIDTHxHEIGHT."""
    seed: int | None = None
    """Of the first image; by default a random one, which the answer names."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    """b64_json puts the PNG into the answer; url puts a link there, where the service has a storage in S3."""
    stream: bool = False
    """Server-sent events: the place in the queue, the steps, and the images at the end."""
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

    request: dict[str, Any]
    """What POST /v1/images/generations takes, but for `stream`, and with a larger `n`."""


class _ImageUrl(Strict):
    url: str
    """A data URI, data:image/png;base64,...; addresses are not fetched."""
    detail: Annotated[str | None, only("auto", why="a captioner sees every image at one size; leave it out")] = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl
    prompt_cache_breakpoint: _UnreadObject = None


class TextPart(Strict):
    type: Literal["text"]
    text: Annotated[str, SOMETIMES_READ]
    """Words of the prompt, where the captioner takes one; else not read."""
    prompt_cache_breakpoint: _UnreadObject = None


def _with_short_type(part: Any) -> Any:
    """Cut a part's type: pydantic repeats an unknown one whole in its error, which is slow for megabytes."""
    if not isinstance(part, dict) or not isinstance(kind := part.get("type"), str | list | dict):
        return part
    return {**part, "type": kind[:MAX_REASON] if isinstance(kind, str) else f"a {type(kind).__name__}"}


_Part = Annotated[ImagePart | TextPart, Field(discriminator="type"), BeforeValidator(_with_short_type)]


class Message(Strict):
    role: Literal["user", "system", "developer"]
    """One message is the user's."""
    content: str | list[_Part]
    """Parts, one of them an image: {"type": "image_url", "image_url": {"url": "data:..."}}."""
    name: _UnreadText = None


class ChatRequest(Strict):
    """POST /v1/chat/completions: a message of the user with one image.

    Text may stand beside the image, and messages of the system before it. All words together are the prompt of a
    captioner that takes one (`takes_prompt` of GET /v1/models). Other captioners do not read them.
    """

    messages: list[Message]
    """A message of the user with one image."""
    model: str | None = None
    """Name of a captioner; by default the first one of the service."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest caption, in words."""
    max_completion_tokens: int | None = Field(None, ge=1)
    """The same as `max_tokens`."""
    stream: bool | None = None
    """Server-sent events: chunks of the caption, and [DONE] at the end."""
    stream_options: Annotated[dict[str, Any] | None, SOMETIMES_READ] = None
    """{"include_usage": true} sends the number of words before the end; read with `stream` alone."""
    n: Annotated[int | None, only(1, why="an image has one caption; give 1")] = None
    temperature: _UnreadNumber = None
    top_p: _UnreadNumber = None
    # Of servers of open models, as `min_p` and `repetition_penalty`.
    top_k: Annotated[int | None, UNREAD] = None
    min_p: _UnreadNumber = None
    seed: Annotated[int | None, UNREAD] = None
    presence_penalty: Annotated[float | None, only(0, why=_NO_PENALTY)] = None
    frequency_penalty: Annotated[float | None, only(0, why=_NO_PENALTY)] = None
    repetition_penalty: Annotated[float | None, only(1, why=_NO_PENALTY)] = None
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
    """Data URIs, data:image/png;base64,...; addresses are not fetched."""
    models: list[str] | None = None
    """Names of captioners; by default all of the service."""


@dataclass(frozen=True)
class GenerateWork:
    """The work of a generator, with every default filled in. Image i is made of the prompt and ``seeds[i]``."""

    prompt: str
    seeds: tuple[int, ...]
    options: dict[str, Any]
    """By the API's names, as ``options.asked_options`` gives them."""
    size: tuple[int, int] | None = None
    """Height and width; None is the model's own."""
    request_id: str = ""
    """Id of the request, for the logs."""
    ignored: tuple[str, ...] = ()
    """Fields of the request that were not read, which the answer names."""

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "GenerateWork":
        """The work of the fields that ``dataclasses.asdict`` gave. Raises TypeError for other fields."""
        # Written before generators had options of their own.
        old = ("num_inference_steps", "guidance_scale", "negative_prompt")
        kept: dict[str, Any] = {name: value for name, value in fields.items() if name not in old}
        kept.setdefault("options", {name: fields[name] for name in old if fields.get(name) is not None})
        # JSON has lists alone.
        for name in ("seeds", "ignored", "size"):
            if name == "seeds" or kept.get(name) is not None:
                kept[name] = tuple(kept[name])
        return cls(**kept)


def model_of(fields: Any) -> str | None:
    """The model of a GenerationRequest, which decides about its other fields. Raises ApiError."""
    name = fields.get("model") if isinstance(fields, dict) else None
    if name is not None and not isinstance(name, str):
        raise bad_value("model", f"{quoted(name)}; give the name of a model")
    return name


def size_text(size: tuple[int, int]) -> str:
    """(height, width) as WIDTHxHEIGHT, the form of OpenAI's clients."""
    return f"{size[1]}x{size[0]}"


def generate_work(
    request: GenerationRequest, info: "GeneratorInfo", limits: Limits, *, is_job: bool = False, request_id: str = ""
) -> GenerateWork:
    """The request with the model's defaults filled in and every range checked. Raises ApiError.

    `request` has the model's options; `info` is the model as GET /v1/models describes it.
    """
    check_text(request.prompt, limits.max_prompt_chars, "prompt")
    if not request.prompt.strip():
        raise bad_value("prompt", "it is empty; give at least one word")
    if request.n < 1:
        raise ApiError(400, f"n must be at least 1, got {quoted(request.n)}", param="n", code="invalid_value")
    if request.n > (limits.max_job_n if is_job else limits.max_n):
        a_job = f"a job (POST /v1/jobs) makes up to {limits.max_job_n}"
        most = a_job if is_job else f"one request makes up to {limits.max_n}, and {a_job}"
        raise bad_value("n", f"{quoted(request.n)} images; {most}")
    asked_size = info["defaults"]["size"] if request.size in (None, "auto") else request.size
    if (match := _SIZE.fullmatch(asked_size)) is None:
        raise bad_value("size", f"{quoted(asked_size)}; give auto or WIDTHxHEIGHT, such as {info['defaults']['size']}")
    size = (int(match.group(2)), int(match.group(1)))
    options = asked_options(request, info["options"], limits.most_of_options(), limits.max_prompt_chars)
    seed = secrets.randbelow(MAX_IMAGE_SEED - request.n) if request.seed is None else request.seed
    if not 0 <= seed <= MAX_IMAGE_SEED - request.n:
        raise bad_value("seed", f"{quoted(seed)}; give 0 to {MAX_IMAGE_SEED - request.n}")
    seeds = tuple(range(seed, seed + request.n))
    return GenerateWork(request.prompt, seeds, options, size, request_id, tuple(unread_fields(request)))


def image_of_chat(request: ChatRequest) -> tuple[str, str, list[str]]:
    """The one image of a chat as a data URI, the place where it stands, and the fields that are not read.

    Raises ApiError for a chat without an image, with several, or with several messages of the user.
    """
    users = [index for index, message in enumerate(request.messages) if message.role == "user"]
    if len(users) != 1:
        raise bad_value("messages", f"{len(users)} messages of the user; give one, with one image")
    param = f"messages.{users[0]}.content"
    if isinstance(request.messages[users[0]].content, str):
        raise bad_value(param, "it is text alone; give an image (a part of type image_url)")
    images: list[tuple[str, str]] = []
    ignored = unread_fields(request)
    for number, message in enumerate(request.messages):
        parts = [] if isinstance(message.content, str) else message.content
        places = [(index, part) for index, part in enumerate(parts) if isinstance(part, ImagePart)]
        if message.role == "user":
            images = [(part.image_url.url, f"{param}.{index}.image_url.url") for index, part in places]
        elif places:
            where = f"messages.{number}.content.{places[0][0]}"
            raise bad_value(where, f"an image in a message of the {message.role}; put it into the user's message")
        else:
            ignored = [*(each for each in ignored if not each.startswith(f"messages.{number}.")), f"messages.{number}"]
    if len(images) != 1:
        raise bad_value(param, f"{len(images)} images; give one, or send several to POST /v1/captions")
    return *images[0], ignored


def prompt_of_chat(request: ChatRequest, limits: Limits, ignored: list[str]) -> tuple[str | None, list[str]]:
    """The words of all messages, a line each text, and `ignored` without their places; None for a chat without words.

    Raises ApiError for words that are too long, or that no tokenizer takes.
    """
    texts: list[str] = []
    read = set()
    for number, message in enumerate(request.messages):
        if isinstance(message.content, str):
            texts.append(message.content)
        else:
            texts += [part.text for part in message.content if isinstance(part, TextPart)]
        read.add(f"messages.{number}")
        read |= {f"messages.{number}.content.{index}.text" for index in range(len(message.content))}
    prompt = "\n".join(text for text in texts if text.strip())
    check_text(prompt, limits.max_prompt_chars, "messages")
    return (prompt or None), [place for place in ignored if place not in read]


class ChatChunks:
    """The chunks of a chat that is streamed. The first one tells the role and what was ignored of the request."""

    def __init__(self, request_id: str, model: str, ignored: list[str]) -> None:
        self._about = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._about |= {"object": "chat.completion.chunk"}
        self._first = {"ignored": ignored} if ignored else {}
        self._sent: str | None = None

    def words(self, text: str) -> list[dict[str, Any]]:
        """The chunk of what `text`, the caption so far, has beyond the chunks before; none if it has no more.

        A shorter text is that of a replica that began again. Raises ApiError 503 for a text that goes on differently.
        """
        sent = self._sent or ""
        if not text.startswith(sent):
            if sent.startswith(text):
                return []
            raise ApiError(503, "the model was replaced; try again", code="model_unavailable", retry_after_s=5.0)
        if text == self._sent:
            return []
        role = {"role": "assistant"} if self._sent is None else {}
        first = self._first if self._sent is None else {}
        self._sent = text
        return [{**self._about, **first, "choices": [self._choice({**role, "content": text[len(sent) :]}, None)]}]

    def end(self, answer: dict[str, Any], *, include_usage: bool) -> list[dict[str, Any]]:
        """The last words of the answer, why it ended and, if wanted, the number of words."""
        (choice,) = answer["choices"]
        ended = {**self._about, "choices": [self._choice({}, choice["finish_reason"])]}
        usage = [{**self._about, "choices": [], "usage": answer["usage"]}] if include_usage else []
        return [*self.words(choice["message"]["content"]), ended, *usage]

    def _choice(self, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def chat_answer(request_id: str, model: str, caption: str, max_words: int, ignored: list[str]) -> dict[str, Any]:
    """The answer to a chat. `ignored`: the fields of the request that were not read.

    A caption of `max_words` counts as cut: it is not known whether it would have ended there.
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


def generation_answer(
    work: GenerateWork, model: str, created: int, images: list[dict[str, str]], unknown_words: list[str]
) -> dict[str, Any]:
    """The answer to a request for images. `images`: ``{"b64_json": ...}`` or ``{"url": ...}`` for each seed."""
    data = [{**image, "seed": seed, "revised_prompt": None} for image, seed in zip(images, work.seeds, strict=True)]
    about = {
        "created": created,
        "model": model,
        "size": work.size and size_text(work.size),
        "background": "opaque",
        "output_format": "png",
        "unknown_words": unknown_words,
    }
    return {**about, "data": data, **({"ignored": list(work.ignored)} if work.ignored else {})}


def completed_events(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of OpenAI's API for finished images: one for each image of an answer."""
    about = {name: answer[name] for name in ("size", "background", "output_format")}
    about |= {"type": "image_generation.completed", "created_at": answer["created"], "quality": "auto"}
    return [{**about, **image} for image in answer["data"]]
