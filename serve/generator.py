"""A generator of images in a replica: batches of equal settings and one size, progress, and work that can be let go."""

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np

from mmcore import recipe
from mmcore.device import compute_thread
from mmcore.errors import OptionError
from mmcore.images import png_bytes
from serve import hardware
from serve.batching import Batcher
from serve.errors import ApiError, ErrorFields, bad_value
from serve.limits import Limits
from serve.metrics import ImageFacts, configure_logging, facts_of
from serve.options import Told, options_of, png_text, refusal_of, tell, texts_of
from serve.schemas import GenerateWork, size_text

_CPU_BATCH_SIZE, _GPU_BATCH_SIZE = 4, 8

# What the images of a batch share: the generator's options, and height and width.
Group = tuple[Any, tuple[int, int]]
# What each image of a batch has of its own: prompt and seed.
Sample = tuple[str, int]


class GeneratorLimits(TypedDict):
    """The largest values that a request may give; of some options, where the generator has them."""

    n: int
    job_n: int
    prompt_chars: int
    num_inference_steps: NotRequired[float]
    guidance_scale: NotRequired[float]
    guidance_scale_end: NotRequired[float]


class GeneratorInfo(TypedDict):
    """A generator's description of itself; `resolution` in pixels a side, where its images are squares."""

    id: str
    object: Literal["model"]
    owned_by: str
    kind: Literal["generator"]
    resolution: int | None
    options: Told
    defaults: dict[str, Any]
    """By the options' names, and `size`."""
    limits: GeneratorLimits


class QueuedEvent(TypedDict):
    """The number of images before the last one of the request."""

    event: Literal["queued"]
    position: int


class ProgressEvent(TypedDict):
    """The number of steps that are done."""

    event: Literal["progress"]
    step: int
    total: int


class DoneEvent(TypedDict):
    """The images as PNG, and the facts of each. `unknown_words`: those of the texts that the model does not know."""

    event: Literal["done"]
    images: list[bytes]
    facts: list[ImageFacts]
    unknown_words: list[str]


class RefusedEvent(TypedDict):
    """Why the model refuses the work."""

    event: Literal["refused"]
    error: ErrorFields


# A stream ends with one of these.
LastEvent = DoneEvent | RefusedEvent
Event = QueuedEvent | ProgressEvent | LastEvent


class _Progress:
    """Combines the steps and places of a request's images into events. It makes one only where a number changes."""

    def __init__(self, num_images: int, events: "asyncio.Queue[Event | None]") -> None:
        self._done, self._queued, self._events = [0] * num_images, dict.fromkeys(range(num_images), -1), events
        self._told: tuple[str, int] | None = None

    def listener(self, index: int) -> "_Listener":
        return _Listener(self, index)

    def queued(self, index: int, position: int) -> None:
        self._queued[index] = position
        # The last image decides when all are made. Its place is known when every image has one.
        last = max(self._queued.values())
        if not any(self._done) and min(self._queued.values()) >= 0:
            self._tell("queued", last, {"event": "queued", "position": last})

    def step(self, index: int, done: int, total: int) -> None:
        self._done[index] = done
        step = sum(self._done) // len(self._done)
        if step:
            self._tell("progress", step, {"event": "progress", "step": step, "total": total})

    def _tell(self, name: str, number: int, event: Event) -> None:
        if self._told != (name, number):
            self._told = (name, number)
            self._events.put_nowait(event)


class _Listener:
    def __init__(self, progress: _Progress, index: int) -> None:
        self._progress, self._index = progress, index

    def on_queued(self, position: int) -> None:
        self._progress.queued(self._index, position)

    def on_step(self, done: int, total: int) -> None:
        self._progress.step(self._index, done, total)


class Generator:
    """The replica. An image depends on its prompt, its seed and the request's settings alone."""

    def __init__(self, name: str, load: Callable[[str], recipe.Generator], limits: Limits) -> None:
        """`load` is given the device."""
        configure_logging()
        self.name, self.limits = name, limits
        device, thread = hardware.device(), compute_thread(hardware.num_threads(limits))
        self.model = thread.submit(load, device).result()
        default = _CPU_BATCH_SIZE if device == "cpu" else _GPU_BATCH_SIZE
        self.batcher: Batcher[Sample, np.ndarray] = Batcher(
            self._run,
            batch_size=limits.generator_batch_size or default,
            wait_s=limits.batch_wait_s,
            max_silence_s=limits.request_timeout_s,
            thread=thread,
        )
        self._encoders = ThreadPoolExecutor(2, thread_name_prefix="png")

    def check_health(self) -> None:
        self.batcher.check()

    async def describe(self) -> GeneratorInfo:
        """As GET /v1/models shows it."""
        (height, width), limits, options = self.model.size, self.limits, tell(self.model.options)
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "mmcore",
            "kind": "generator",
            "resolution": height if height == width else None,
            "options": options,
            "defaults": {
                **{name: each["default"] for name, each in options.items()},
                "size": size_text((height, width)),
            },
            "limits": {
                "n": limits.max_n,
                "job_n": limits.max_job_n,
                "prompt_chars": limits.max_prompt_chars,
                **cast(Any, {name: most for name, most in limits.most_of_options().items() if name in options}),
            },
        }

    async def check(self, work: GenerateWork) -> ErrorFields | None:
        """Why the model refuses the work, as `ApiError.as_dict`; None where it does not."""
        try:
            self._group(work)
        except ApiError as error:
            return error.as_dict()
        return None

    def _group(self, work: GenerateWork) -> Group:
        """What images must share to be in one batch. Raises ApiError for work that the model cannot do.

        It does not compute on the model, as it runs in the thread of the requests (see `compute_thread`).
        """
        model = self.model
        options, size = options_of(work.options, model.options), work.size or model.size
        most = min(self.limits.max_prompt_tokens, model.max_tokens)
        texts = self._texts(work)
        for name, num_tokens in zip(texts, model.num_tokens(list(texts.values())), strict=True):
            if num_tokens > most:
                raise bad_value(name, f"{num_tokens} tokens with begin and end; at most {most}")
        try:
            model.check(options, size)
        except OptionError as error:
            raise refusal_of(error, model.options) from None
        return options, size

    def _texts(self, work: GenerateWork) -> dict[str, str]:
        return {"prompt": work.prompt, **texts_of(work.options, self.model.options)}

    async def generate(self, work: GenerateWork) -> LastEvent:
        """The last event of `stream`."""
        last: Mapping[str, Any] = {}
        events = self.stream(work)
        try:
            async for event in events:
                last = event
        finally:
            await events.aclose()
        return cast(LastEvent, last)

    async def stream(self, work: GenerateWork) -> AsyncGenerator[Event, None]:
        """Events: queued (position), progress (step, total), and at the end a DoneEvent or a RefusedEvent."""
        try:
            group = self._group(work)
        except ApiError as error:
            yield {"event": "refused", "error": error.as_dict()}
            return
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        progress = _Progress(len(work.seeds), events)
        tasks = [
            asyncio.ensure_future(self.batcher.submit(group, (work.prompt, seed), progress.listener(index)))
            for index, seed in enumerate(work.seeds)
        ]

        def end(done: "asyncio.Future[Any]") -> None:
            # The exception is read even if the caller has gone: asyncio would report one that was never read.
            if not done.cancelled():
                done.exception()
            events.put_nowait(None)

        all_done = asyncio.gather(*tasks)
        all_done.add_done_callback(end)
        try:
            while (event := await events.get()) is not None:
                yield event
            results = all_done.result()
        finally:
            # A caller that stops reading stops the work.
            for task in tasks:
                task.cancel()
        loop = asyncio.get_running_loop()
        began = loop.time()
        images = await asyncio.gather(
            *(
                loop.run_in_executor(self._encoders, png_bytes, result.value, self._text(work.prompt, seed, group))
                for result, seed in zip(results, work.seeds, strict=True)
            )
        )
        facts: list[ImageFacts] = [{**facts_of(result), "encode_s": loop.time() - began} for result in results]
        found = self.model.unknown_words(list(self._texts(work).values()))
        words = list(dict.fromkeys(itertools.chain.from_iterable(found)))
        yield {"event": "done", "images": list(images), "facts": facts, "unknown_words": words}

    def _text(self, prompt: str, seed: int, group: Group) -> dict[str, str]:
        """The text of the PNG, under the names of a sweep's images."""
        return {"prompt": prompt, "seed": str(seed), **png_text(group[0]), "model": self.name}

    def _run(self, group: Group, samples: list[Sample], on_step: Callable[[int, int], None]) -> list[np.ndarray]:
        options, size = group
        # Kernels round differently for different batch sizes. A batch is filled up to one size, so that an image is the
        # same to the bit whatever other images are in it.
        padded = samples + samples[-1:] * (self.batcher.batch_size - len(samples))
        prompts, seeds = [prompt for prompt, _ in padded], [seed for _, seed in padded]
        images = self.model.generate(prompts, seeds, options, size=size, on_step=on_step)
        return list(images[: len(samples)])
