"""A PatchGAN discriminator, which classifies each patch of an image as real or reconstructed (Isola et al. 2017).

Shapes: B images, P pixels a side, H and W patches.
"""

import itertools

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel size 4 with leaky ReLU. All but the last have stride 2.

    It uses GroupNorm instead of the BatchNorm of the paper and the report. With batch statistics a step would depend on
    the number of workers and micro-batches.
    """

    def __init__(self, channels: tuple[int, ...], norm_groups: int) -> None:
        """`channels`: the channels of each layer but the last, which has one channel."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for before, after in itertools.pairwise(channels):
            layers += [
                nn.Conv2d(before, after, 4, stride=2, padding=1, bias=False),
                nn.GroupNorm(norm_groups, after),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], 1, 4, padding=1))

    def forward(self, x_B3PP: Tensor) -> Tensor:
        """Images in [-1, 1] -> scores (B, H, W), near 1 for a real patch."""
        return self.layers(x_B3PP).squeeze(1)


def generator_loss(fake_BHW: Tensor) -> Tensor:
    """The generator's loss per image, (B,): LSGAN with 1 for real (Mao et al. 2017, equation 9)."""
    return (_at_least_fp32(fake_BHW) - 1).square().mean((1, 2))


def discriminator_loss(real_BHW: Tensor, fake_BHW: Tensor) -> Tensor:
    """The discriminator's loss per image, (B,): LSGAN with 1 for real and 0 for reconstructed."""
    real_BHW, fake_BHW = _at_least_fp32(real_BHW), _at_least_fp32(fake_BHW)
    return ((real_BHW - 1).square().mean((1, 2)) + fake_BHW.square().mean((1, 2))) / 2


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
