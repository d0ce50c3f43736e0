"""Peak signal-to-noise ratio (PSNR) of images, and the PSNR of bicubic downsampling as a baseline.

Shapes: B images, P pixels a side.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmcore.data.pixels import to_network

# A perfect reconstruction counts as one of 100 dB.
_MIN_SQUARED_ERROR = 1e-10


def psnr(x_B3PP: Tensor, y_B3PP: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,) in dB of images in [-1, 1]. `y` is clipped to [-1, 1]."""
    error_B = (x_B3PP - y_B3PP.clamp(-1, 1)).square().mean((1, 2, 3)) / 4
    return -10 * error_B.clamp_min(_MIN_SQUARED_ERROR).log10()


def bicubic_psnr(pixels_BPP3: np.ndarray, factor: int) -> float:
    """Mean PSNR in dB of images after bicubic downsampling by `factor` and upsampling: a baseline for a VQ-VAE."""
    side, total = pixels_BPP3.shape[1], 0.0
    for pixels in pixels_BPP3:
        small = Image.fromarray(pixels).resize((side // factor, side // factor), Image.Resampling.BICUBIC)
        made = np.array(small.resize((side, side), Image.Resampling.BICUBIC))
        total += psnr(*(to_network(torch.from_numpy(each[None])) for each in (pixels, made))).item()
    return total / len(pixels_BPP3)
