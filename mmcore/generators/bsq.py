"""Binary spherical quantisation of a latent image, from coarse to fine.

A position has d bits: bit 1 where a channel is above 0. Its vector is (2 · bit − 1) / √d, a point of the unit sphere
(Zhao et al. 2024, https://arxiv.org/abs/2406.07548). Grids from coarse to fine each quantise what the grids before left
(Han et al. 2024, https://arxiv.org/abs/2412.04431, section 3.2).

Shapes: B images, d bits of a position, H and W sides of the latent image, h and w those of a grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcore.generators.infinity_scales import Grid

Change = Callable[[int, Tensor], Tensor]
"""The number of a grid and its bits (B, d, h, w) -> the bits from which the next grids go on."""


@dataclass(frozen=True)
class Quantized:
    """A latent image as bits."""

    bits: list[Tensor]
    """For each grid: bool (B, d, h, w)."""
    latents_BdHW: Tensor
    """The sum of all grids, each enlarged to (H, W)."""
    inputs: list[Tensor]
    """For each grid but the first, what the Transformer sees: the sum of the grids before it, (B, d, h, w)."""


def bits_of(latents_BdHW: Tensor) -> Tensor:
    """Bit 1 where a channel is above 0: bool, the same shape. The length of a latent does not matter."""
    return latents_BdHW > 0


def vectors_of(bits_BdHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The vectors of these bits, of length 1: (B, d, h, w)."""
    return (bits_BdHW.to(dtype) * 2 - 1) / bits_BdHW.shape[1] ** 0.5


def enlarge(latents_Bdhw: Tensor, grid: Grid) -> Tensor:
    """Resize to a grid by linear interpolation. The sum of the grids passes through it in both directions."""
    if latents_Bdhw.shape[2:] == grid:
        return latents_Bdhw
    return F.interpolate(latents_Bdhw, size=grid, mode="bilinear")


def shrink(latents_BdHW: Tensor, grid: Grid) -> Tensor:
    """Resize to a coarser grid by the mean of the area."""
    if latents_BdHW.shape[2:] == grid:
        return latents_BdHW
    return F.interpolate(latents_BdHW, size=grid, mode="area")


def quantize(latents_BdHW: Tensor, grids: Sequence[Grid], change: Change | None = None) -> Quantized:
    """Quantise a latent image grid by grid.

    Args:
        latents_BdHW: continuous features of the encoder, fp32. Its sides are those of the last grid.
        grids: from coarse to fine.
        change: gives other bits than the right ones to the following grids. They then correct the error (bitwise
            self-correction, section 3.4). `Quantized.bits` always holds the right bits.
    """
    assert tuple(latents_BdHW.shape[2:]) == grids[-1], "the last grid has the sides of the latent image"
    total_BdHW = torch.zeros_like(latents_BdHW)
    bits, inputs = [], []
    for number, grid in enumerate(grids):
        bits.append(bits_of(shrink(latents_BdHW - total_BdHW, grid)))
        given = bits[-1] if change is None else change(number, bits[-1])
        total_BdHW = total_BdHW + enlarge(vectors_of(given, latents_BdHW.dtype), grids[-1])
        if number + 1 < len(grids):
            inputs.append(enlarge(total_BdHW, grids[number + 1]))
    return Quantized(bits, total_BdHW, inputs)
