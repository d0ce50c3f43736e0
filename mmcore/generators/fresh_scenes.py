"""Shapes scenes that are drawn, rendered and encoded while a model trains: no epoch sees one again.

Scene `index` and all that is said of it come from (seed, index), and its codes are the same in every batch: nothing has
to be stored, and a resumed run sees what the run before it would have seen.

Shapes: B scenes of a batch, P pixels a side, h and w sides of a grid of codes, L = h·w codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcore.data.prepared import TRAIN
from mmcore.data.shapes import SceneObject, ShapesSettings, make_scene, render_scene
from mmcore.data.shapes_captions import exhaustive_caption, scene_captions
from mmcore.device import compute_thread
from mmcore.frozen.text import NO_TEXT, PromptTokenizer
from mmcore.images import resize_image
from mmcore.recipe import Autoencoder
from mmcore.rows import Batch

# Images that are encoded at once, filled up where there are fewer. On a CPU the last bits of a sum depend on how many
# there are: alone, 15 of 131,072 codes were others on two threads, and with a fixed number on one thread not one latent
# differed by a bit, whatever the others in the batch.
_ENCODE_BATCH = 8


@dataclass(frozen=True)
class Draw:
    """What is random of one row in one epoch."""

    mirrored: bool
    caption: float | None
    """In [0, 1), which of its captions; None has no text."""
    exhaustive: float
    """In [0, 1), against the share of exhaustive captions."""


class FreshScenes:
    """The training scenes of Shapes by their index, beyond any number of them."""

    def __init__(
        self,
        settings: ShapesSettings,
        autoencoder: Autoencoder,
        tokenizer: PromptTokenizer,
        *,
        captions_per_image: int,
        exhaustive_captions: float,
    ) -> None:
        """`settings`: those of the dataset that the scenes go on; `autoencoder`: loaded;
        `exhaustive_captions`: share of the captions that name all there is."""
        self.settings, self.autoencoder, self.tokenizer = settings, autoencoder, tokenizer
        self.captions_per_image, self.exhaustive_captions = captions_per_image, exhaustive_captions
        # Of its own, as whoever asks for batches computes beside a training.
        self.thread = compute_thread(1)

    def batch(self, indices: Sequence[int], draws: Sequence[Draw]) -> Batch:
        """`codes` int64 (B, L) and `input_ids` (B, T) of the scenes `indices`, which nothing mirrors."""
        settings = self.settings
        scenes = [make_scene(settings.seed, TRAIN, index, settings.max_objects) for index in indices]
        texts = [self._text(*each) for each in zip(indices, scenes, draws, strict=True)]
        return {"codes": self._codes(scenes).flatten(1), "input_ids": self.tokenizer(texts)[0]}

    def _text(self, index: int, scene: tuple[SceneObject, ...], draw: Draw) -> str:
        if draw.caption is None:
            return NO_TEXT
        if draw.exhaustive < self.exhaustive_captions:
            return exhaustive_caption(self.settings.seed, TRAIN, index, scene)
        captions = scene_captions(self.settings.seed, TRAIN, index, scene)[: self.captions_per_image]
        return captions[int(draw.caption * len(captions))]

    def _codes(self, scenes: Sequence[tuple[SceneObject, ...]]) -> Tensor:
        """int64 (B, h, w)."""
        size = self.autoencoder.image_size
        images = [resize_image(render_scene(scene, self.settings.image_size), size) for scene in scenes]
        missing = -len(images) % _ENCODE_BATCH
        pixels = np.stack([*images, *[images[-1]] * missing])
        parts = [pixels[start : start + _ENCODE_BATCH] for start in range(0, len(pixels), _ENCODE_BATCH)]
        codes = [self.thread.submit(self.autoencoder.codes, part).result().cpu() for part in parts]
        return torch.cat(codes)[: len(scenes)]
