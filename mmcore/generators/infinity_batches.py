"""Images of Infinity for many prompts: a seed an image, and batches that the memory holds.

The keys and values of all positions are most of the memory. An image of 1M pixels by Infinity-2B with guidance has
5.5 GB of them in bf16 (`infinity_cost.cache_bytes`).

Precision: `half_precision` computes under autocast. Linear layers, attention, the cache and the decoder are then in
bf16 or fp16. Hidden states between the layers, norms, modulation and rotary positions stay in fp32. So do the length of
queries and keys, the head with its logits, and the sum of the grids.

Shapes: B images, T text tokens, C channels of a text token, d bits of a position, L positions of all grids, H and W
sides of the latent image, P and Q sides of an image.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from mmcore.data.pixels import to_pixels
from mmcore.errors import OptionError
from mmcore.generators.code_sampling import uniforms
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_cost import cache_bytes
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_sampling import sample
from mmcore.generators.infinity_scales import Grid, num_positions
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings

# Bytes of a layer's intermediate results for each position of the last grid and each channel: the hidden state, its
# norm, queries, keys and values in fp32 before and after the rotation, and twice four channels of the feed-forward
# layer.
_LAYER_BYTES = 60
# Intermediate results of the decoder in fp32 at the side of the image: input, norm, activation, output.
_DECODER_BYTES = 4 * 4
# Share of the free memory that is planned with. Allocation is not without gaps.
_USABLE = 0.9


def half_precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Within the block, a model computes in `dtype`: bf16, fp16, or fp32 as it is."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class ImageMemory:
    """Bytes of one image."""

    keys_values: int
    """Keys and values of all positions, of both rows of guidance."""
    sampling: int
    """All of the sampling: keys and values, those of the text, and intermediate results."""
    decoding: int
    """Intermediate results of the decoder."""

    def images_at_once(self, free: int) -> tuple[int, int]:
        """How many images fit into `free` bytes: in a batch of the sampling, and in one of the decoder."""
        usable = int(_USABLE * free)
        return usable // self.sampling, usable // self.decoding


def image_memory(
    settings: InfinitySettings,
    vae: InfinityVaeSettings,
    grids: Sequence[Grid],
    options: InfinityOptions,
    dtype: torch.dtype,
    *,
    patch: int = 1,
) -> ImageMemory:
    """Bytes of one image whose prompt has the longest length. Keys and values are exact, the rest is an estimate."""
    drawn = grids[: options.num_grids]
    rows = 2 if any(options.guidance_of(number) != 1 for number in range(len(drawn))) else 1
    keys_values = cache_bytes(settings, rows, drawn, dtype)
    text = 2 * settings.num_layers * rows * settings.max_text_tokens * settings.width * dtype.itemsize
    layer = rows * drawn[-1][0] * drawn[-1][1] * settings.width * _LAYER_BYTES
    # The level below the full side enlarges its channels to it.
    widest = vae.width * max(vae.factors[:2])
    decoding = grids[-1][0] * grids[-1][1] * (patch * vae.stride) ** 2 * widest * _DECODER_BYTES
    return ImageMemory(keys_values, keys_values + text + layer, decoding)


def even_parts(num: int, most: int) -> list[list[int]]:
    """`num` places in as few batches of one size as have at most `most`. The last batch repeats the last place."""
    size = math.ceil(num / math.ceil(num / most))
    return [[min(place, num - 1) for place in range(at, at + size)] for at in range(0, num, size)]


class InfinityImages:
    """Texts and seeds -> images, in batches that the memory holds."""

    def __init__(
        self,
        model: InfinityTransformer,
        vae: InfinityVae,
        *,
        free: int,
        dtype: torch.dtype = torch.float32,
        patch: int = 1,
    ) -> None:
        """
        Args:
            free: bytes that the images may take.
            dtype: precision of the computation, see the head of this file.
            patch: positions of the latent image on a side of a position of the Transformer.
        """
        self.model, self.vae, self.free, self.dtype, self.patch = model, vae, free, dtype, patch
        self._told: set[str] = set()

    def __call__(
        self,
        text_BTC: Tensor,
        mask_BT: Tensor,
        seeds: Sequence[int],
        grids: Sequence[Grid],
        finest: Grid,
        options: InfinityOptions,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """uint8 (B, P, Q, 3). An image depends on its text and its seed, and not on the others of its batch.

        Args:
            text_BTC, mask_BT: as in `InfinityTransformer.text_state`.
            grids, finest: as in `infinity_sampling.sample`.
            on_step: is called with the grids that are done and all of them, over all batches.
        Raises OptionError for a value of `options` out of its range, and for an image that the memory does not hold.
        """
        options.check(self.model.settings.num_layers)
        most, most_decoded = self._at_once(grids, options)
        parts = even_parts(len(seeds), most)
        total = len(parts) * len(grids[: options.num_grids])
        latents = [
            self._latents(
                text_BTC[part],
                mask_BT[part],
                [seeds[place] for place in part],
                grids,
                finest,
                options,
                None if on_step is None else _after(on_step, number * total // len(parts), total),
            )
            for number, part in enumerate(parts)
        ]
        latents_BdHW = torch.cat(latents)[: len(seeds)]
        images = []
        with torch.inference_mode(), half_precision(latents_BdHW.device, self.dtype):
            for part in even_parts(len(seeds), most_decoded):
                images.append(to_pixels(self.vae.decoder(latents_BdHW[part])))
        return torch.cat(images)[: len(seeds)]

    def _latents(
        self,
        text_BTC: Tensor,
        mask_BT: Tensor,
        seeds: Sequence[int],
        grids: Sequence[Grid],
        finest: Grid,
        options: InfinityOptions,
        on_step: Callable[[int], None] | None,
    ) -> Tensor:
        numbers_BLd = uniforms(seeds, num_positions(tuple(grids)), self.model.settings.num_bits).to(text_BTC.device)
        with half_precision(text_BTC.device, self.dtype):
            for step in sample(self.model, text_BTC, mask_BT, grids, finest, options, numbers_BLd, patch=self.patch):
                if on_step is not None:
                    on_step(step.number + 1)
        return step.latents_BdHW

    def _at_once(self, grids: Sequence[Grid], options: InfinityOptions) -> tuple[int, int]:
        """How many images are sampled and decoded at once. Each answer is printed once."""
        memory = image_memory(self.model.settings, self.vae.settings, grids, options, self.dtype, patch=self.patch)
        sampled, decoded = memory.images_at_once(self.free)
        side = self.patch * self.vae.settings.stride
        size = f"{grids[-1][1] * side}x{grids[-1][0] * side}"
        if not sampled or not decoded:
            needed = max(memory.sampling, memory.decoding) / _USABLE
            raise OptionError(
                "size",
                f"{size}: an image needs {needed / 1e9:.1f} GB of memory, and {self.free / 1e9:.1f} GB are free; "
                "choose fewer pixels, or a guidance of 1",
            )
        line = (
            f"infinity: {size} in {str(self.dtype).removeprefix('torch.')}: {memory.keys_values / 1e9:.2f} GB of keys "
            f"and values an image; at most {sampled} images at once in {self.free / 1e9:.1f} GB"
        )
        if line not in self._told:
            self._told.add(line)
            print(line, file=sys.stderr, flush=True)
        return sampled, decoded


def _after(on_step: Callable[[int, int], None], done: int, total: int) -> Callable[[int], None]:
    return lambda number: on_step(done + number, total)
