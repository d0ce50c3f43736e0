"""Sampling of the next code from logits: guidance scale, temperature, top-k and nucleus sampling.

Shapes: B images, L codes of an image, V codes of the codebook.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.generators.autoregressive_options import AutoregressiveOptions


def guidance_at(options: AutoregressiveOptions, place: int, length: int) -> float:
    """The guidance scale of code `place` of `length`: linear from the first code to the last."""
    if options.guidance_end is None or length == 1:
        return options.guidance
    return options.guidance + (options.guidance_end - options.guidance) * place / (length - 1)


def allowed(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """The codes that may be sampled, bool (B, V): the `top_k` most likely (0: all), then the nucleus of these.

    The nucleus is the smallest set of most likely codes with a total probability of at least `top_p` (Holtzman et al.
    2020, arXiv 1904.09751, section 3.1).
    """
    sorted_BV, code_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if top_k:
        kept_BV[:, top_k:] = False
    if top_p < 1:
        probability_BV = sorted_BV.masked_fill(~kept_BV, -torch.inf).double().softmax(-1)
        # Compare the probability before a code, so that the first code and the one that crosses `top_p` are kept.
        kept_BV &= probability_BV.cumsum(-1) - probability_BV < top_p
    return torch.zeros_like(kept_BV).scatter_(1, code_BV, kept_BV)


def draw_codes(logits_BV: Tensor, uniform_B: Tensor, options: AutoregressiveOptions) -> Tensor:
    """Sample one code per image, int64 (B,): the first whose cumulative probability exceeds a uniform number.

    Args:
        logits_BV: fp32, after guidance.
        uniform_B: fp32 in [0, 1), from the generator of each image.
    """
    # Shift the largest logit to 0, so that dividing by a low temperature cannot overflow.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / options.temperature
    if options.top_k or options.top_p < 1:
        scaled_BV = scaled_BV.masked_fill(~allowed(scaled_BV, options.top_k, options.top_p), -torch.inf)
    # In the order of the codebook, not of probability: rounding can swap nearly equal logits, which would change the
    # code. In float64 a number below 1 stays below the total, so no code of probability 0 is sampled.
    cumulative_BV = scaled_BV.double().softmax(-1).cumsum(-1)
    wanted_B = uniform_B.double() * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True).squeeze(1)


def uniforms(seeds: Sequence[int], *shape: int) -> Tensor:
    """Uniform numbers in [0, 1), fp32 (B, *shape): those of an image from a CPU generator with its seed."""
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
