"""A PatchGAN discriminator: is each patch of an image a photo's or a reconstruction's (Isola et al. 2017)?

Shapes: B images, P pixels a side, H and W patches.
"""

import itertools

import torch
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4, all but the last of stride 2, leaky ReLU.

    GroupNorm where the paper (and the report) has BatchNorm: batch statistics would make a step depend on the number
    of workers and micro-batches.
    """

    def __init__(self, channels: tuple[int, ...], norm_groups: int) -> None:
        """`channels`: of each layer but the last, which has one."""
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
        """Images in [-1, 1] -> (B, H, W), near 1 where a patch looks real."""
        return self.layers(x_B3PP).squeeze(1)


def fooling_loss(fake_BHW: Tensor) -> Tensor:
    """What the generator minimises, for each image (B,): LSGAN (Mao et al. 2017, equation 9), real = 1."""
    return (_at_least_fp32(fake_BHW) - 1).square().mean((1, 2))


def telling_loss(real_BHW: Tensor, fake_BHW: Tensor) -> Tensor:
    """What the discriminator minimises, for each image (B,): real = 1, reconstruction = 0."""
    real_BHW, fake_BHW = _at_least_fp32(real_BHW), _at_least_fp32(fake_BHW)
    return ((real_BHW - 1).square().mean((1, 2)) + fake_BHW.square().mean((1, 2))) / 2


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
