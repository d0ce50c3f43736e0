"""Sampling of images with Infinity's Transformer, many prompts at once, each with a seed of its own.

Shapes: B images, R rows of a batch (2·B with guidance), T text tokens, C channels of a text token, d bits of a
position, h and w sides of a grid, L = h·w positions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.generators.bsq import enlarge, vectors_of
from mmcore.generators.infinity import Cache, InfinityTransformer, TextState, rope_table
from mmcore.generators.infinity_options import InfinityOptions
from mmcore.generators.infinity_scales import Grid, num_positions


def draw_bits(logits_BLd2: Tensor, uniforms_BLd: Tensor | None, options: InfinityOptions) -> Tensor:
    """Bits, bool (B, L, d): 1 where the uniform number is below the probability of bit 1.

    There are two values of a bit, so the official `top_k` of 900 has no effect.

    Args:
        logits_BLd2: fp32, after guidance.
        uniforms_BLd: in [0, 1), from the generator of each image. None takes the more likely bit.
    """
    # Softmax of two logits is the sigmoid of their difference.
    difference_BLd = logits_BLd2[..., 1] - logits_BLd2[..., 0]
    if uniforms_BLd is None or options.temperature == 0:
        return difference_BLd > 0
    probability_BLd = torch.sigmoid(difference_BLd / options.temperature)
    kept_BLd = torch.where(probability_BLd <= 1 - options.top_p, 0.0, probability_BLd)
    kept_BLd = torch.where(1 - probability_BLd <= 1 - options.top_p, 1.0, kept_BLd)
    return uniforms_BLd < kept_BLd


@dataclass(frozen=True)
class Step:
    """A grid of a batch of images."""

    number: int
    """Number of the grid, from 0."""
    logits_BLd2: Tensor
    """Logits after guidance, fp32."""
    bits_Bdhw: Tensor
    """The bits drawn, at the sides of the latent image's grid."""
    latents_BdHW: Tensor
    """The sum of the grids so far, at the sides of the last grid."""


@torch.inference_mode()
def sample(
    model: InfinityTransformer,
    text_BTC: Tensor,
    mask_BT: Tensor,
    grids: Sequence[Grid],
    finest: Grid,
    options: InfinityOptions,
    uniforms_BLd: Tensor | None,
    *,
    patch: int = 1,
) -> Iterator[Step]:
    """Draw images grid by grid. The latents of the last step go to the decoder.

    Args:
        text_BTC, mask_BT: as in `InfinityTransformer.text_state`.
        grids: of the Transformer, from coarse to fine.
        finest: last grid of the ratio's largest schedule.
        uniforms_BLd: a number for each bit of all grids; None takes the more likely bit.
        patch: positions of the latent image on a side of a position of the Transformer.
    Raises OptionError for a value of `options` out of its range.
    """
    options.check(model.settings.num_layers)
    drawn = grids[: options.num_grids]
    guided = any(options.guidance_of(number) != 1 for number in range(len(drawn)))
    text = _both(model, text_BTC, mask_BT) if guided else model.text_state(text_BTC, mask_BT)
    num_images, num_rows = len(text_BTC), len(text.pooled_RD)
    cache = Cache(model.settings, num_rows, num_positions(tuple(drawn)), text.keys_values[0][0])
    rope_2Lh = rope_table(model.settings, grids, finest).to(text_BTC.device)
    latent_grids = [(h * patch, w * patch) for h, w in grids]
    total_BdHW: Tensor | None = None
    for number, grid in enumerate(drawn):
        guidance = options.guidance_of(number)
        if guidance == 1 and len(text.pooled_RD) > num_images:
            # No later grid is guided, so the rows without a prompt end here.
            text = text.first_rows(num_images)
        start, num = cache.length, grid[0] * grid[1]
        inputs = None
        if total_BdHW is not None:
            small = F.pixel_unshuffle(enlarge(total_BdHW, latent_grids[number]), patch)
            inputs = small.flatten(2).transpose(1, 2)
            inputs = inputs.repeat(len(text.pooled_RD) // num_images, 1, 1)
        hidden_RLD = model.embed(text, number, inputs)
        mix = _mix_at(model.settings.num_layers + options.guidance_layer, guidance) if options.guidance_layer else None
        hidden_RLD = model.step(
            hidden_RLD, text, rope_2Lh[:, start : start + num], cache, mix if guidance != 1 else None
        )
        if guidance != 1 and mix is None:
            logits = model.logits(hidden_RLD, text.pooled_RD)
            logits = guidance * logits[:num_images] + (1 - guidance) * logits[num_images:]
        else:
            logits = model.logits(hidden_RLD[:num_images], text.pooled_RD[:num_images])
        numbers = None if uniforms_BLd is None else uniforms_BLd[:, start : start + num]
        bits_Bdhw = F.pixel_shuffle(
            draw_bits(logits, numbers, options).transpose(1, 2).unflatten(2, grid).to(torch.uint8), patch
        ).bool()
        added_BdHW = enlarge(vectors_of(bits_Bdhw), latent_grids[-1])
        total_BdHW = added_BdHW if total_BdHW is None else total_BdHW + added_BdHW
        yield Step(number, logits, bits_Bdhw, total_BdHW)


def _both(model: InfinityTransformer, text_BTC: Tensor, mask_BT: Tensor) -> TextState:
    """The prompts, then as many rows without one. The empty prompt is as long as the prompt."""
    empty_TC = model.no_text_TC[: text_BTC.shape[1]].to(text_BTC)
    texts = torch.cat([text_BTC, empty_TC.expand_as(text_BTC)])
    return model.text_state(texts, mask_BT.repeat(2, 1))


def _mix_at(layer: int, guidance: float) -> Callable[[int, Tensor], Tensor]:
    """Guide what leaves `layer`. Rows with and without a prompt are then the same."""

    def mix(number: int, hidden_RLD: Tensor) -> Tensor:
        if number != layer:
            return hidden_RLD
        with_text, without = hidden_RLD.chunk(2)
        return (guidance * with_text + (1 - guidance) * without).repeat(2, 1, 1)

    return mix
