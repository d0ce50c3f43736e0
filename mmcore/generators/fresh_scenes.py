"""New Shapes scenes for every epoch. They are rendered and encoded during the training.

A scene and its captions depend on (seed, index) only. Its codes or latents do not depend on the batch. No scenes are
stored, and a resumed run trains on the same scenes as an unbroken run.

Shapes: B scenes of a batch, P pixels a side, h and w sides of a grid of codes, L = h·w codes, C channels of
latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mmcore.data.prepared import TRAIN
from mmcore.data.shapes import SceneObject, ShapesSettings, make_scene, render_scene
from mmcore.data.shapes_captions import exhaustive_caption, scene_captions
from mmcore.device import compute_thread
from mmcore.frozen.text import NO_TEXT, PromptTokenizer
from mmcore.images import resize_image
from mmcore.rows import Batch

# Images per encoding batch; smaller batches are padded. On a CPU the last bits of a sum depend on the batch size. With
# single images on two threads, 15 of 131,072 codes differed. With a fixed batch size on one thread all latents were
# bit-identical for any other images in the batch.
_ENCODE_BATCH = 8
Output = Literal["codes", "latents"]


@dataclass(frozen=True)
class Draw:
    """The random choices for one row in one epoch."""

    mirrored: bool
    caption: float | None
    """A number in [0, 1) that selects the caption; None is the empty text."""
    exhaustive: float
    """A number in [0, 1). The caption is exhaustive if it is below the share of exhaustive captions."""


class FreshScenes:
    """The training scenes of Shapes by index, without a limit."""

    def __init__(
        self,
        settings: ShapesSettings,
        encode: Callable[[np.ndarray], Tensor],
        tokenizer: PromptTokenizer,
        *,
        output: Output,
        image_size: int,
        captions_per_image: int,
        exhaustive_captions: float,
    ) -> None:
        """
        Args:
            settings: the settings of the dataset, whose scenes are continued.
            encode: the method of a loaded autoencoder that makes `output` of uint8 (B, P, P, 3).
            image_size: P.
            exhaustive_captions: share of the captions that describe the whole scene.
        """
        self.settings, self.encode, self.tokenizer = settings, encode, tokenizer
        self.output, self.image_size = output, image_size
        self.captions_per_image, self.exhaustive_captions = captions_per_image, exhaustive_captions
        # A thread of its own, as batches are requested while the training computes.
        self.thread = compute_thread(1)

    def batch(self, indices: Sequence[int], draws: Sequence[Draw]) -> Batch:
        """`codes` int64 (B, L) or `latents` (B, C, h, w), and `input_ids` (B, T), of the scenes `indices`.

        Scenes are never mirrored.
        """
        settings = self.settings
        scenes = [make_scene(settings.seed, TRAIN, index, settings.max_objects) for index in indices]
        texts = [self._text(*each) for each in zip(indices, scenes, draws, strict=True)]
        made = self._encoded(scenes)
        return {
            self.output: made.flatten(1) if self.output == "codes" else made,
            "input_ids": self.tokenizer(texts)[0],
        }

    def _text(self, index: int, scene: tuple[SceneObject, ...], draw: Draw) -> str:
        if draw.caption is None:
            return NO_TEXT
        if draw.exhaustive < self.exhaustive_captions:
            return exhaustive_caption(self.settings.seed, TRAIN, index, scene)
        captions = scene_captions(self.settings.seed, TRAIN, index, scene)[: self.captions_per_image]
        return captions[int(draw.caption * len(captions))]

    def _encoded(self, scenes: Sequence[tuple[SceneObject, ...]]) -> Tensor:
        """Codes (B, h, w) or latents (B, C, h, w)."""
        size = self.image_size
        images = [resize_image(render_scene(scene, self.settings.image_size), size) for scene in scenes]
        missing = -len(images) % _ENCODE_BATCH
        pixels = np.stack([*images, *[images[-1]] * missing])
        parts = [pixels[start : start + _ENCODE_BATCH] for start in range(0, len(pixels), _ENCODE_BATCH)]
        made = [self.thread.submit(self.encode, part).result().cpu() for part in parts]
        return torch.cat(made)[: len(scenes)]
