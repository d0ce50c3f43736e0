"""What an image of Infinity costs: FLOPs of its parts and memory of its keys and values.

A multiplication and its addition are two FLOPs, as `torch.utils.flop_counter` counts. Products of matrices and
convolutions count; sums, norms and activations do not.

Shapes: T text tokens, C channels of a text token, D width, L positions of a grid, K positions up to it, d bits of a
position, F width of the feed-forward layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from mmcore.generators.infinity import InfinitySettings
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_scales import Grid, num_positions
from mmcore.generators.infinity_vae import InfinityVaeSettings


@dataclass(frozen=True)
class T5Sizes:
    """Sizes of the encoder of a T5 with gated feed-forward layers. The defaults are those of flan-t5-xl."""

    num_layers: int = 24
    """Number of layers."""
    width: int = 2048
    """Width of the layers."""
    attention_width: int = 2048
    """Heads times the width of a head."""
    ffn_width: int = 5120
    """Width of the feed-forward layers."""

    @property
    def num_weights(self) -> int:
        """Weights of the layers, without the table of tokens, of which a prompt reads a few rows."""
        return self.num_layers * self.width * (4 * self.attention_width + 3 * self.ffn_width)


@dataclass(frozen=True)
class InfinityCost:
    """FLOPs of one image."""

    text: int
    """The text encoder."""
    transformer: int
    """The Transformer, with the rows of guidance."""
    decoder: int
    """The decoder of the tokenizer."""

    @property
    def total(self) -> int:
        return self.text + self.transformer + self.decoder


def image_cost(
    settings: InfinitySettings,
    vae: InfinityVaeSettings,
    grids: Sequence[Grid],
    options: InfinityOptions,
    *,
    text: T5Sizes | None = None,
    patch: int = 1,
) -> InfinityCost:
    """FLOPs of one image whose prompt is padded to the longest length.

    Args:
        grids: of the Transformer, from coarse to fine.
        options: guidance decides how many rows are computed, `num_grids` how many grids.
        text: sizes of the text encoder; None is flan-t5-xl.
        patch: positions of the latent image on a side of a position of the Transformer.
    """
    height, width = grids[-1]
    return InfinityCost(
        text=text_flops(text or T5Sizes(), settings.max_text_tokens),
        transformer=transformer_flops(settings, settings.max_text_tokens, grids, options),
        decoder=decoder_flops(vae, (height * patch, width * patch)),
    )


def text_flops(sizes: T5Sizes, num_tokens: int) -> int:
    """FLOPs of the text encoder for one prompt, padding included."""
    attention = 4 * 2 * num_tokens * sizes.width * sizes.attention_width + 4 * num_tokens**2 * sizes.attention_width
    ffn = 3 * 2 * num_tokens * sizes.width * sizes.ffn_width
    return sizes.num_layers * (attention + ffn)


def transformer_flops(
    settings: InfinitySettings, num_tokens: int, grids: Sequence[Grid], options: InfinityOptions
) -> int:
    """FLOPs of the Transformer for one image, as `infinity_sampling.sample` computes it."""
    drawn = grids[: options.num_grids]
    guided = any(options.guidance_of(number) != 1 for number in range(len(drawn)))
    flops, num_before = (1 + guided) * _state_flops(settings, num_tokens), 0
    for number, (height, width) in enumerate(drawn):
        rows = 1 if options.guidance_of(number) == 1 else 2
        num = height * width
        num_before += num
        flops += rows * _step_flops(settings, num_tokens, num, num_before)
        # The first grid has no inputs but the text.
        flops += rows * 2 * num * settings.num_bits * settings.width if number else 0
        # Guidance of a layer makes both rows the same, so only one reaches the head.
        headed = 1 if options.guidance_layer else rows
        flops += headed * (2 * num * settings.width * 2 * settings.num_bits + 2 * settings.width * 2 * settings.width)
    return flops


def _state_flops(settings: InfinitySettings, num_tokens: int) -> int:
    """FLOPs of `InfinityTransformer.text_state` for one row."""
    width, channels = settings.width, settings.text_channels
    pool = 2 * num_tokens * channels * 2 * width + 4 * num_tokens * width + 2 * width**2
    projection = 2 * num_tokens * channels * width + 2 * num_tokens * width**2
    modulation = 2 * width * 6 * width
    return pool + projection + modulation + settings.num_layers * 2 * num_tokens * width * 2 * width


def _step_flops(settings: InfinitySettings, num_tokens: int, num: int, num_keys: int) -> int:
    """FLOPs of all layers for `num` positions of one row that see `num_keys`."""
    width = settings.width
    self_attention = 4 * 2 * num * width**2 + 4 * num * num_keys * width
    cross_attention = 2 * 2 * num * width**2 + 4 * num * num_tokens * width
    return settings.num_layers * (self_attention + cross_attention + 2 * 2 * num * width * settings.ffn_width)


def decoder_flops(vae: InfinityVaeSettings, latent: Grid) -> int:
    """FLOPs of the decoder for one latent image with these sides."""
    widths = [vae.width * factor for factor in vae.factors]
    area = latent[0] * latent[1]
    flops = 2 * area * (9 * vae.num_bits * widths[-1] + 2 * _block_weights(widths[-1], widths[-1]))
    before = widths[-1]
    for level in range(len(widths) - 1, -1, -1):
        steps = [before] + [widths[level]] * (vae.num_blocks + 1)
        flops += 2 * area * sum(_block_weights(*pair) for pair in pairwise(steps))
        before = widths[level]
        if level:
            area *= 4
            flops += 2 * area * 9 * before**2
    return flops + 2 * area * 9 * widths[0] * 3


def _block_weights(width_in: int, width_out: int) -> int:
    """Weights of the convolutions of a residual block."""
    shortcut = width_in * width_out if width_in != width_out else 0
    return 9 * width_in * width_out + 9 * width_out**2 + shortcut


def cache_bytes(settings: InfinitySettings, num_rows: int, grids: Sequence[Grid], dtype: torch.dtype) -> int:
    """Bytes of the keys and values of all positions, which `infinity.Cache` allocates.

    Args:
        num_rows: an image with guidance has two.
        grids: of the Transformer, from coarse to fine.
    """
    return 2 * settings.num_layers * num_rows * num_positions(tuple(grids)) * settings.width * dtype.itemsize
