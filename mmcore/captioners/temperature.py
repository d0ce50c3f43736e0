"""The learned temperature that divides the similarities of images and texts (CLIP, section 2.5).

Radford et al. 2021, https://arxiv.org/abs/2103.00020. The parameter is the logarithm of what multiplies them.
"""

import math

import torch
from torch import Tensor, nn

_FIRST_TEMPERATURE, _LARGEST_SCALE = 0.07, 100.0


def first_log_scale() -> nn.Parameter:
    """The parameter before the training: a scalar.

    A learned temperature itself, as in LAVIS, fell below 0 in a trial. Its gradient of 1,000 hid all others.
    """
    return nn.Parameter(torch.tensor(-math.log(_FIRST_TEMPERATURE)))


def temperature_of(log_scale: Tensor) -> Tensor:
    """What divides the similarities: a scalar of at least 0.01."""
    return torch.exp(-log_scale.clamp(max=math.log(_LARGEST_SCALE)))


@torch.no_grad()
def limit_(log_scale: Tensor) -> None:
    """Clamp the parameter in place before a step, as CLIP does.

    The clamp in `temperature_of` alone would give no gradient, so the scale could not fall again.
    """
    log_scale.clamp_(max=math.log(_LARGEST_SCALE))
