"""A captioner in a replica: pixels in, captions out, in batches."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, final

import numpy as np

from mmcore import recipe
from mmcore.device import compute_thread
from mmcore.errors import InputError
from serve import hardware
from serve.batching import Batcher
from serve.errors import ErrorFields, bad_value
from serve.limits import Limits
from serve.metrics import ImageFacts, configure_logging, facts_of

_CPU_BATCH_SIZE, _GPU_BATCH_SIZE = 16, 64

# What the images of a batch share: the search options and the prompt. A prompt that the model refuses fails no other.
Group = tuple[Any, str | None]


class CaptionerLimits(TypedDict):
    """The most that a request may send to a captioner."""

    images: int
    image_bytes: int
    data_uri_bytes: int
    pixels: int


class CaptionerInfo(TypedDict):
    """A captioner's description of itself; `resolution` in pixels a side."""

    id: str
    object: Literal["model"]
    owned_by: str
    kind: Literal["captioner"]
    resolution: int
    takes_prompt: bool
    """Whether the words of a chat are its prompt."""
    options: None
    defaults: None
    limits: CaptionerLimits


@final
class Captioned(TypedDict):
    """The caption of an image, and its times."""

    caption: str
    facts: ImageFacts


@final
class OtherResolution(TypedDict):
    """The answer where no pixels had the model's size: that size, in pixels a side."""

    resolution: int


@final
class RefusedPrompt(TypedDict):
    """Why the model refuses the prompt."""

    refused: ErrorFields


@final
class Written(TypedDict):
    """The words of a caption so far, without those that may still change."""

    written: str


Answer = Captioned | OtherResolution | RefusedPrompt


@dataclass(frozen=True)
class _Asked:
    """An image, and who is told its caption so far, in the model's thread."""

    pixels: np.ndarray
    on_text: Callable[[str], None] | None = None


class Captioner:
    """The replica."""

    def __init__(self, name: str, load: Callable[[str], recipe.Captioner], limits: Limits) -> None:
        """`load` is given the device."""
        configure_logging()
        self.name, self.limits = name, limits
        device, thread = hardware.device(), compute_thread(hardware.num_threads(limits))
        self.model = thread.submit(load, device).result()
        default = _CPU_BATCH_SIZE if device == "cpu" else _GPU_BATCH_SIZE
        self.batcher: Batcher[_Asked, str] = Batcher(
            self._run,
            batch_size=limits.captioner_batch_size or default,
            wait_s=limits.batch_wait_s,
            max_silence_s=limits.request_timeout_s,
            thread=thread,
        )

    def check_health(self) -> None:
        self.batcher.check()

    async def describe(self) -> CaptionerInfo:
        """As GET /v1/models shows it."""
        limits = self.limits
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "mmcore",
            "kind": "captioner",
            "resolution": self.model.image_size,
            "takes_prompt": self.model.takes_prompt,
            "options": None,
            "defaults": None,
            "limits": {
                "images": limits.max_images,
                "image_bytes": limits.max_image_bytes,
                "data_uri_bytes": limits.max_data_uri_bytes,
                "pixels": limits.max_pixels,
            },
        }

    async def caption(
        self,
        pixels: Mapping[int, np.ndarray],
        max_words: int,
        prompt: str | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """The caption of one image and the facts of its batch. `pixels`: uint8 (P, P, 3) by size P.

        `prompt`: only for a model that takes one. Images of the same prompt share their batches.

        If none has this model's size, the caller knew another version of the model. The answer is then the
        `resolution` of this one. `on_text` is told the caption so far, if the model tells it.
        """
        resolution = self.model.image_size
        if resolution not in pixels:
            return {"resolution": resolution}
        names = recipe.capped_fields(self.model.options)
        # A model whose own search is greedy, such as a large language model, stays so.
        greedy = "beams" in names and getattr(self.model.options, names["beams"]) == 1
        caps = {"words": max_words, "beams": 1 if greedy else self.limits.caption_beams}
        options = dataclasses.replace(self.model.options, **{name: caps[what] for what, name in names.items()})
        try:
            result = await self.batcher.submit((options, prompt), _Asked(pixels[resolution], on_text))
        except InputError as error:
            if prompt is None:
                raise
            return {"refused": bad_value("messages", str(error)).as_dict()}
        return {"caption": result.value, "facts": facts_of(result)}

    async def stream(
        self, pixels: Mapping[int, np.ndarray], max_words: int, prompt: str | None = None
    ) -> AsyncGenerator[Written | Answer, None]:
        """As `caption`, but before that answer come the words that a greedy search has found."""
        loop, texts = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def on_text(text: str) -> None:
            loop.call_soon_threadsafe(texts.put_nowait, text)

        def end(done: "asyncio.Future[Any]") -> None:
            # The exception is read even if the caller has gone: asyncio would report one that was never read.
            if not done.cancelled():
                done.exception()
            texts.put_nowait(None)

        answer, told = asyncio.ensure_future(self.caption(pixels, max_words, prompt, on_text)), ""
        answer.add_done_callback(end)
        try:
            while (text := await texts.get()) is not None:
                # The last word may still grow, and a tokenizer may join it to a mark.
                whole = text.rpartition(" ")[0]
                if len(whole) > len(told):
                    told = whole
                    yield {"written": told}
            yield await answer
        finally:
            # A caller that stops reading stops the work.
            answer.cancel()

    def _run(self, group: Group, asked: list[_Asked], on_step: Callable[[int, int], None]) -> Sequence[str]:
        options, prompt = group
        pixels = np.stack([each.pixels for each in asked])
        more: dict[str, Any] = {} if prompt is None else {"prompts": [prompt] * len(asked)}
        if any(each.on_text is not None for each in asked):

            def on_text(image: int, text: str) -> None:
                # A sign of life. It ends a batch whose callers have gone. No listener reads the numbers.
                on_step(0, 1)
                if (tell := asked[image].on_text) is not None:
                    tell(text)

            more["on_text"] = on_text
        return self.model.caption(pixels, options, **more)
