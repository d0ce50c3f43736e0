"""The convolutional encoder and decoder of Infinity's tokenizer, between an image and its latent image.

Sizes and names are those of the official checkpoints (Han et al. 2024, https://arxiv.org/abs/2412.04431).
`mmcore.generators.bsq` turns the latent image into bits.

Shapes: B images, P and Q sides of an image, d bits of a position, H = P / stride and W = Q / stride.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.generators.patch_encoder import patch_encoder

_NORM_EPS = 1e-6


@dataclass(frozen=True)
class InfinityVaeSettings:
    """Sizes of the encoder and the decoder."""

    num_bits: int = 32
    """Channels of the latent image, which are the bits of a position."""
    width: int = 128
    """Channels at the full side."""
    factors: tuple[int, ...] = (1, 2, 4, 4, 4)
    """Width of each level over `width`. Each level but the last halves the side."""
    num_blocks: int = 2
    """Residual blocks of a level of the encoder. The decoder has one more."""
    norm_groups: int = 32
    """Groups of each GroupNorm. Official models have 32."""
    encoder: Literal["convolutions", "patches"] = "convolutions"
    """patches encodes each patch of the image separately. Official models have convolutions."""
    patch_size: int = 1
    """Side in pixels of the patches that are moved into channels. Official models have 1."""

    @property
    def stride(self) -> int:
        """Side of an image over the side of its latent image."""
        return int(self.patch_size * 2 ** (len(self.factors) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of each level, from the full side on."""
        return [self.width * factor for factor in self.factors]


class _Norm(nn.Module):
    """Group normalisation, one level deeper than usual, as in the official names."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=_NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden)


class _Conv(nn.Module):
    """A convolution, one level deeper than usual, as in the official names."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        # A convolution that halves the side pads right and below only.
        self.pad = (0, 1, 0, 1) if stride == 2 else None
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride, padding=0 if self.pad else kernel // 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden if self.pad is None else F.pad(hidden, self.pad))


class ResidualBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width_in: int, width_out: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _Norm(width_in, groups), _Conv(width_in, width_out, 3)
        self.norm2, self.conv2 = _Norm(width_out, groups), _Conv(width_out, width_out, 3)
        self.nin_shortcut = _Conv(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        change = self.conv1(F.silu(self.norm1(hidden)))
        return self.nin_shortcut(hidden) + self.conv2(F.silu(self.norm2(change)))


class _Upsample(nn.Module):
    """Twice the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _Conv(width, width, 3)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(F.interpolate(hidden, scale_factor=2, mode="nearest"))


class _Downsample(nn.Module):
    """Half the side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _Conv(width, width, 3, stride=2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv(hidden)


def _level(widths: Sequence[int], groups: int, **resize: nn.Module) -> nn.ModuleDict:
    """Blocks between consecutive widths, and what resizes after them."""
    blocks = [ResidualBlock(before, after, groups) for before, after in pairwise(widths)]
    return nn.ModuleDict({"block": nn.ModuleList(blocks), **resize})


def _middle(width: int, groups: int) -> nn.ModuleDict:
    return nn.ModuleDict({name: ResidualBlock(width, width, groups) for name in ("block_1", "block_2")})


def _run(level: nn.Module, hidden: Tensor) -> Tensor:
    for module in level.children():
        for each in module if isinstance(module, nn.ModuleList) else [module]:
            hidden = each(hidden)
    return hidden


class Encoder(nn.Module):
    """An image -> its latent image, before quantisation."""

    def __init__(self, settings: InfinityVaeSettings) -> None:
        super().__init__()
        widths, groups = settings.widths, settings.norm_groups
        self.conv_in = _Conv(3 * settings.patch_size**2, settings.width, 3)
        self.down = nn.ModuleList()
        for number, (before, after) in enumerate(zip([settings.width, *widths], widths, strict=False)):
            resize = {} if number == len(widths) - 1 else {"downsample": _Downsample(after)}
            self.down.append(_level([before] + [after] * settings.num_blocks, groups, **resize))
        self.mid = _middle(widths[-1], groups)
        self.norm_out, self.conv_out = _Norm(widths[-1], groups), _Conv(widths[-1], settings.num_bits, 3)

    def forward(self, images_B3PQ: Tensor) -> Tensor:
        """Images from -1 to 1, their patches moved into channels -> (B, d, H, W)."""
        hidden = self.conv_in(images_B3PQ)
        for level in [*self.down, self.mid]:
            hidden = _run(level, hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class Decoder(nn.Module):
    """A quantised latent image -> an image."""

    def __init__(self, settings: InfinityVaeSettings) -> None:
        super().__init__()
        widths, groups = settings.widths, settings.norm_groups
        self.conv_in = _Conv(settings.num_bits, widths[-1], 3)
        self.mid = _middle(widths[-1], groups)
        # As in the official names, level 0 has the full side. The last level runs first.
        self.up = nn.ModuleList()
        for number, (after, before) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            resize = {"upsample": _Upsample(after)} if number else {}
            self.up.append(_level([before] + [after] * (settings.num_blocks + 1), groups, **resize))
        self.norm_out, self.conv_out = _Norm(widths[0], groups), _Conv(widths[0], 3 * settings.patch_size**2, 3)

    def forward(self, latents_BdHW: Tensor) -> Tensor:
        """(B, d, H, W) -> images, about -1 to 1 and not clamped, their patches moved into channels."""
        hidden = self.conv_in(latents_BdHW)
        for level in [self.mid, *reversed(self.up)]:
            hidden = _run(level, hidden)
        return self.conv_out(F.silu(self.norm_out(hidden)))


class InfinityVae(nn.Module):
    """Encoder and decoder."""

    def __init__(self, settings: InfinityVaeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder: nn.Module
        if settings.encoder == "patches":
            num_channels, side = 3 * settings.patch_size**2, settings.stride // settings.patch_size
            self.encoder = patch_encoder(num_channels, side, 2 * settings.widths[-1], settings.num_bits)
        else:
            self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)

    def encode(self, images_B3PQ: Tensor) -> Tensor:
        """Images from -1 to 1 -> latents (B, d, H, W) before quantisation, in fp32 or above."""
        latents_BdHW = self.encoder(F.pixel_unshuffle(images_B3PQ, self.settings.patch_size))
        return latents_BdHW.to(torch.promote_types(latents_BdHW.dtype, torch.float32))

    def decode(self, latents_BdHW: Tensor) -> Tensor:
        """The sum of the grids (B, d, H, W) -> images (B, 3, P, Q), about -1 to 1 and not clamped."""
        return F.pixel_shuffle(self.decoder(latents_BdHW), self.settings.patch_size)
