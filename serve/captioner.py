"""A captioner in a replica: pixels in, captions out, in batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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


class Captioner:
    """The replica."""

    def __init__(self, name: str, load: Callable[[str], recipe.Captioner], limits: Limits) -> None:
        """`load` is given the device."""
        configure_logging()
        self.name, self.limits = name, limits
        device, thread = hardware.device(), compute_thread(hardware.num_threads(limits))
        self.model = thread.submit(load, device).result()
        default = _CPU_BATCH_SIZE if device == "cpu" else _GPU_BATCH_SIZE
        self.batcher: Batcher[np.ndarray, str] = Batcher(
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
        self, pixels: Mapping[int, np.ndarray], max_words: int, prompt: str | None = None
    ) -> Captioned | OtherResolution | RefusedPrompt:
        """The caption of one image and the facts of its batch. `pixels`: uint8 (P, P, 3) by size P.

        `prompt`: only for a model that takes one. Images of the same prompt share their batches.

        If none has this model's size, the caller knew another version of the model. The answer is then the
        `resolution` of this one.
        """
        resolution = self.model.image_size
        if resolution not in pixels:
            return {"resolution": resolution}
        caps = {"words": max_words, "beams": self.limits.caption_beams}
        own = {name: caps[what] for what, name in recipe.capped_fields(self.model.options).items()}
        options = dataclasses.replace(self.model.options, **own)
        try:
            result = await self.batcher.submit((options, prompt), pixels[resolution])
        except InputError as error:
            if prompt is None:
                raise
            return {"refused": bad_value("messages", str(error)).as_dict()}
        return {"caption": result.value, "facts": facts_of(result)}

    def _run(self, group: Group, pixels: list[np.ndarray], on_step: Callable[[int, int], None]) -> Sequence[str]:
        options, prompt = group
        if prompt is None:
            return self.model.caption(np.stack(pixels), options)
        return self.model.caption(np.stack(pixels), options, [prompt] * len(pixels))
