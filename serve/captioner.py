"""A captioner in a replica: pixels in, captions out, in batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mmcore.device import compute_thread
from mmcore.storage import Storage
from serve import hardware
from serve.batching import Batcher
from serve.limits import Limits
from serve.metrics import configure_logging, facts_of, log_work

_CPU_BATCH_SIZE, _GPU_BATCH_SIZE = 16, 64


class CaptionerModel(Protocol):
    """What the replica needs of a captioner."""

    resolution: int
    device: str

    def caption(self, pixels: np.ndarray, *, num_beams: int, max_words: int) -> Sequence[str]:
        """uint8 (B, P, P, 3) -> B captions."""


class _Trained:
    """A finished run of a captioner."""

    def __init__(self, run: Storage, encoder: str | None, device: str) -> None:
        from mmcore.trained.captioner import open_captioner

        self.device = device
        self._captioner = open_captioner(run.uri, encoder=encoder).load(device)
        self.resolution: int = self._captioner.image_size

    def caption(self, pixels: np.ndarray, *, num_beams: int, max_words: int) -> Sequence[str]:
        options = dataclasses.replace(self._captioner.options, num_beams=num_beams, max_length=max_words)
        return self._captioner.caption(pixels, options)


def load_captioner(run: str, encoder: str | None, device: str) -> CaptionerModel:
    """The captioner of a finished run, local or in S3."""
    return _Trained(Storage(run), encoder, device)


class Captioner:
    """The replica."""

    def __init__(self, name: str, load: Callable[[str], CaptionerModel], limits: Limits) -> None:
        """`load` is given the device."""
        configure_logging()
        self.name, self.limits = name, limits
        thread = compute_thread(hardware.num_threads(limits))
        self.model = thread.submit(load, hardware.device()).result()
        default = _CPU_BATCH_SIZE if self.model.device == "cpu" else _GPU_BATCH_SIZE
        self.batcher: Batcher[np.ndarray, str] = Batcher(
            self._run,
            batch_size=limits.captioner_batch_size or default,
            wait_s=limits.batch_wait_s,
            max_silence_s=limits.request_timeout_s,
            thread=thread,
        )

    def check_health(self) -> None:
        self.batcher.check()

    async def describe(self) -> dict[str, Any]:
        """As GET /v1/models shows it."""
        limits = self.limits
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "mmcore",
            "kind": "captioner",
            "resolution": self.model.resolution,
            "defaults": None,
            "limits": {
                "images": limits.max_images,
                "image_bytes": limits.max_image_bytes,
                "data_uri_bytes": limits.max_data_uri_bytes,
                "pixels": limits.max_pixels,
            },
        }

    async def caption(self, pixels: Mapping[int, np.ndarray], max_words: int, request_id: str) -> dict[str, Any]:
        """The caption of one image and the facts of its batch. `pixels`: uint8 (P, P, 3) by its size P.

        Where there is none of this model's size, the caller knew another version of it: the answer is the `resolution`
        that is wanted.
        """
        resolution = self.model.resolution
        if resolution not in pixels:
            return {"resolution": resolution}
        result = await self.batcher.submit((self.limits.caption_beams, max_words), pixels[resolution])
        facts = facts_of(result)
        log_work("captioned", request_id, self.name, [facts])
        return {"caption": result.value, "facts": facts}

    def _run(
        self, group: tuple[int, int], pixels: list[np.ndarray], on_step: Callable[[int, int], None]
    ) -> Sequence[str]:
        num_beams, max_words = group
        return self.model.caption(np.stack(pixels), num_beams=num_beams, max_words=max_words)
