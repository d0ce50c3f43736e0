"""The routes for captions: one image in the form of OpenAI's chat, or several images by several captioners."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np
from python_multipart.multipart import parse_options_header
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve import images, schemas
from serve.clients import Model, model_unavailable
from serve.errors import ApiError, ErrorObject, bad_value, fault, quoted
from serve.event_stream import DONE, EventStream, broken_off, event, until_done
from serve.front import Front, facts_of_request
from serve.metrics import logger, note_slowest
from serve.parsing import parse

if TYPE_CHECKING:
    from serve.captioner import Answer, CaptionerInfo, Written

# An image of `max_pixels` takes about seven bytes a pixel while it is decoded and turned upright.
_DECODE_THREADS = 2
_MAX_FILE_NAME = 200
_FORM = "a form with images as files (multipart/form-data)"
# How many versions of a model are asked for one caption. A new version may take images of another size.
_MAX_VERSIONS = 3


class _InMemory(MultiPartParser):
    # Starlette would write larger files to the disk. Here the body is bounded and already in memory.
    spool_max_size = 2**40
    ended = False

    def on_end(self) -> None:
        """Called at the last boundary. A form that ends before it parses like a shorter form."""
        self.ended = True


class _ToldOfImage(TypedDict):
    """Captions by the names of captioners, and the errors of the captioners that failed."""

    captions: dict[str, str]
    errors: NotRequired[dict[str, ErrorObject]]


class CaptionRoutes:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._decoders = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="decode")
        images.harden_pillow()
        images.return_large_blocks()

    async def chat(self, request: Request) -> Response:
        front = self._front
        # One image, and what else a request may say.
        most = images.longest_data_uri(front.limits) + front.limits.max_json_bytes
        asked = parse(schemas.ChatRequest, await front.json(request, min(most, front.limits.max_body_bytes)))
        model = front.named(asked.model, "captioner")
        uri, param, ignored = schemas.image_of_chat(asked)
        data = images.from_data_uri(uri, front.limits, param)
        facts = facts_of_request(request)
        facts.update(model=model.name, n=1)
        words = [front.limits.caption_words, asked.max_tokens, asked.max_completion_tokens]
        image, max_words = _Image(data, param), min(each for each in words if each)
        with contextlib.ExitStack() as held:
            held.enter_context(front.admission.enter({model.name: 1}))
            info, prompt = cast("CaptionerInfo", await model.info()), None
            if info["takes_prompt"]:
                prompt, ignored = schemas.prompt_of_chat(asked, front.limits, ignored)
            if not asked.stream:
                caption = await self._caption(model, image, max_words, facts, prompt)
                return JSONResponse(schemas.chat_answer(facts["request_id"], model.name, caption, max_words, ignored))
            # A broken image is refused before the stream begins.
            await self._decode(image, {info["resolution"]})
            include_usage = (asked.stream_options or {}).get("include_usage") is True
            ignored = [place for place in ignored if place != "stream_options"]

            async def answer(on_text: Callable[[str], None]) -> dict[str, Any]:
                caption = await self._caption(model, image, max_words, facts, prompt, on_text)
                return schemas.chat_answer(facts["request_id"], model.name, caption, max_words, ignored)

            chunks = schemas.ChatChunks(facts["request_id"], model.name, ignored)
            return EventStream(self._chunks(answer, chunks, model, facts, include_usage=include_usage), held.pop_all())

    async def _chunks(
        self,
        answer: Callable[[Callable[[str], None]], Coroutine[Any, Any, dict[str, Any]]],
        chunks: schemas.ChatChunks,
        model: Model,
        line: dict[str, Any],
        *,
        include_usage: bool,
    ) -> AsyncGenerator[bytes, None]:
        """The chunks of a chat as server-sent events, or an error at their end. `line`: what is logged."""
        timeout_s = self._front.limits.request_timeout_s
        deadline = time.monotonic() + timeout_s
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        waiting = asyncio.ensure_future(answer(texts.put_nowait))
        waiting.add_done_callback(lambda _: texts.put_nowait(None))
        getting = asyncio.ensure_future(texts.get())
        try:
            while True:
                async for alive in until_done(getting, timeout_s, deadline):
                    yield alive
                if (text := getting.result()) is None:
                    break
                getting = asyncio.ensure_future(texts.get())
                for chunk in chunks.words(text):
                    yield event(chunk)
            for chunk in chunks.end(waiting.result(), include_usage=include_usage):
                yield event(chunk)
            yield DONE
        except Exception as error:
            yield broken_off(self._front, error, line, model.name)
        finally:
            for task in (waiting, getting):
                task.cancel()
            await asyncio.wait([waiting, getting])

    async def captions(self, request: Request) -> Response:
        front = self._front
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            files, names = await self._form(request)
        else:
            files, names = await self._data_uris(request)
        if names is None:
            names = [model.name for model in front.models.values() if model.kind == "captioner"]
        if not names:
            raise bad_value("models", "no captioner is named; leave it out to ask all of them")
        if len(set(names)) < len(names):
            raise bad_value("models", f"{quoted(names)} names one captioner twice")
        models = [front.named(name, "captioner", "models") for name in names]
        facts = facts_of_request(request)
        facts.update(model=",".join(names), n=len(files))
        # If one of several captioners is dead or still loads, the others answer. A single one is waited for.
        known = [await models[0].info()] if len(models) == 1 else await asyncio.gather(*(m.told() for m in models))
        sizes = {cast("CaptionerInfo", info)["resolution"] for info in known if info is not None}
        able = [model for model, info in zip(models, known, strict=True) if info is not None]
        if not able:
            raise model_unavailable()
        failed: dict[str, ApiError] = {model.name: model_unavailable() for model in models if model not in able}

        async def caption_all(index: int, data: bytes) -> _ToldOfImage:
            image = _Image(data, f"images.{index}", _name(index, len(files), files[index][0]))
            most = front.limits.caption_words
            await self._decode(image, sizes)
            told = await asyncio.gather(*(self._caption_or_error(m, image, most, facts) for m in able))
            captions = {model.name: each for model, each in zip(able, told, strict=True) if isinstance(each, str)}
            errors = {model.name: each for model, each in zip(able, told, strict=True) if isinstance(each, ApiError)}
            if not captions:
                raise next(iter(errors.values()))
            named = {name: error.body()["error"] for name, error in {**failed, **errors}.items()}
            return cast(_ToldOfImage, {"captions": captions, **({"errors": named} if named else {})})

        with front.admission.enter({model.name: len(files) for model in able}):
            async with _all_or_none() as group:
                tasks = [group.create_task(caption_all(index, data)) for index, (_, data) in enumerate(files)]
        answers = [
            {"index": index, **task.result(), "file_name": file_name}
            for index, ((file_name, _), task) in enumerate(zip(files, tasks, strict=True))
        ]
        return JSONResponse({"data": answers})

    async def _data_uris(self, request: Request) -> tuple[list[tuple[str | None, bytes]], list[str] | None]:
        """Images, without names, and the models that are asked for."""
        limits = self._front.limits
        body = await self._front.json(request, limits.max_body_bytes, other=_FORM)
        asked = parse(schemas.CaptionsRequest, body)
        self._check_count(len(asked.images))
        files: list[tuple[str | None, bytes]] = [
            (None, images.from_data_uri(uri, limits, f"images.{index}", _name(index, len(asked.images))))
            for index, uri in enumerate(asked.images)
        ]
        return files, asked.models

    async def _form(self, request: Request) -> tuple[list[tuple[str | None, bytes]], list[str] | None]:
        """Files `images` and fields `model` of a multipart form."""
        limits = self._front.limits
        charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
        if charset.lower() != b"utf-8":
            # A form could name any of Python's codecs. Some are slow, and some make text that no answer can hold.
            message = f"the charset of the form must be utf-8, got {quoted(charset.decode('latin-1'))}"
            raise ApiError(400, message, code="invalid_form")
        parser = _InMemory(
            request.headers, request.stream(), max_files=limits.max_images, max_fields=len(self._front.models) + 1
        )
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise ApiError(400, f"the form: {error.message}", code="invalid_form") from None
        except (LookupError, ValueError):
            raise ApiError(400, "the body is not a form (multipart/form-data)", code="invalid_form") from None
        files: list[tuple[str | None, bytes]] = []
        names: list[str] = []
        try:
            if not parser.ended:
                raise ApiError(400, "the form ends before its last boundary", code="invalid_form")
            for name, value in form.multi_items():
                if name not in ("images", "model"):
                    message = f"unknown field {quoted(name)}; the form has images (files) and model"
                    raise ApiError(400, message, param=name[:64], code="unknown_field")
                if (name == "images") == isinstance(value, str):
                    raise bad_value(name, "images must be files, and model must be text")
                if isinstance(value, str):
                    names.append(value)
                else:
                    file_name = value.filename[:_MAX_FILE_NAME] if value.filename else None
                    files.append((file_name, await value.read()))
        finally:
            await form.close()
        self._check_count(len(files))
        return files, names or None

    def _check_count(self, num_images: int) -> None:
        most = self._front.limits.max_images
        if not 1 <= num_images <= most:
            raise bad_value("images", f"{num_images} images; one request takes 1 to {most}")

    async def _decode(self, image: "_Image", sizes: set[int]) -> None:
        began, limits = time.perf_counter(), self._front.limits
        loop = asyncio.get_running_loop()
        decode = partial(images.decode, image.data, sizes, limits, image.param, image.name)
        image.pixels.update(await loop.run_in_executor(self._decoders, decode))
        self._front.metrics.stage.labels("all", "decode").observe(time.perf_counter() - began)

    async def _caption_or_error(
        self, model: Model, image: "_Image", max_words: int, line: dict[str, Any]
    ) -> str | ApiError:
        """The caption, or an error if the captioner fails. An error of the request itself is raised."""
        try:
            return await self._caption(model, image, max_words, line)
        except ApiError as error:
            if error.status < 500:
                raise
            return error
        except Exception:
            about = {"request_id": line["request_id"], "model": model.name}
            logger.exception("captioner failed", extra={"fields": about})
            return fault(line["request_id"])

    async def _caption(
        self,
        model: Model,
        image: "_Image",
        max_words: int,
        line: dict[str, Any],
        prompt: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """`line`: what is logged of the request. `on_text` is told the caption so far."""
        sizes = {cast("CaptionerInfo", await model.info())["resolution"]}
        for _ in range(_MAX_VERSIONS):
            if missing := sizes - set(image.pixels):
                await self._decode(image, missing)
            pixels = {size: image.pixels[size] for size in sizes}
            asked = (pixels, max_words, *([] if prompt is None else [prompt]))
            if on_text is None:
                done: Answer = await model.replica.call("caption", *asked)
            else:
                done = await _last(model.replica.stream("stream", *asked), on_text)
            if "refused" in done:
                raise ApiError.from_dict(done["refused"])
            if "caption" in done:
                self._front.metrics.observe(model.name, done["facts"])
                note_slowest(line, done["facts"])
                return done["caption"]
            # Another version of the model answered, which takes another size. Either version may answer next.
            model.forget()
            sizes.add(done["resolution"])
        raise model_unavailable()


async def _last(events: "AsyncGenerator[Written | Answer, None]", on_text: Callable[[str], None]) -> "Answer":
    """The answer at the end of a replica's stream."""
    async with contextlib.aclosing(events):
        async for each in events:
            if "written" not in each:
                return cast("Answer", each)
            on_text(cast("Written", each)["written"])
    raise AssertionError("a stream ends with an answer")


def _name(index: int, number: int, file_name: str | None = None) -> str:
    """What a person is told of one of `number` images, by its place and, in a form, by its file."""
    if number == 1:
        return images.THE_IMAGE
    return f"image {index + 1} of {number}{f' ({quoted(file_name)})' if file_name else ''}"


@dataclass
class _Image:
    """An image as it came, and what was decoded of it. A refusal names it by `param` and `name` (`check_image`)."""

    data: bytes
    param: str
    name: str = images.THE_IMAGE
    pixels: dict[int, np.ndarray] = field(default_factory=dict)
    """uint8 (size, size, 3) by size."""


@contextlib.asynccontextmanager
async def _all_or_none() -> AsyncGenerator[asyncio.TaskGroup, None]:
    """A group of tasks that raises the first error itself, instead of a group of errors."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
