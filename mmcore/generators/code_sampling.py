"""How the next code of each image is drawn from logits: guidance, temperature, top-k, nucleus, one uniform number.

Shapes: B images, V codes of the codebook.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.generators.autoregressive_options import AutoregressiveOptions


def guidance_at(options: AutoregressiveOptions, place: int, num_codes: int) -> float:
    """The guidance scale of the code at `place` of `num_codes`: a straight line from the first to the last."""
    if options.guidance_end is None or num_codes == 1:
        return options.guidance
    return options.guidance + (options.guidance_end - options.guidance) * place / (num_codes - 1)


def allowed(logits_BV: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which codes may be drawn, bool (B, V): the `top_k` likeliest (0: all), and of those the fewest, likeliest first,
    that hold `top_p` of their probability (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, section 3.1)."""
    sorted_BV, code_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = torch.ones_like(sorted_BV, dtype=torch.bool)
    if top_k:
        kept_BV[:, top_k:] = False
    if top_p < 1:
        probability_BV = sorted_BV.masked_fill(~kept_BV, -torch.inf).double().softmax(-1)
        # What lies before a code: the first one always stays, and the one that crosses `top_p` does.
        kept_BV &= probability_BV.cumsum(-1) - probability_BV < top_p
    return torch.zeros_like(kept_BV).scatter_(1, code_BV, kept_BV)


def draw_codes(logits_BV: Tensor, uniform_B: Tensor, options: AutoregressiveOptions) -> Tensor:
    """A code of each image, int64 (B,): where the cumulative probability first exceeds its uniform number.

    Args:
        logits_BV: fp32, after guidance.
        uniform_B: fp32 in [0, 1), one of each image's own generator.
    """
    # The likeliest at 0, so that no temperature makes an infinity of it.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / options.temperature
    if options.top_k or options.top_p < 1:
        scaled_BV = scaled_BV.masked_fill(~allowed(scaled_BV, options.top_k, options.top_p), -torch.inf)
    # In the order of the codebook: near ties of logits change places by rounding, and would there change codes. In
    # float64 a number below 1 stays below the whole, so no code without probability is drawn.
    cumulative_BV = scaled_BV.double().softmax(-1).cumsum(-1)
    wanted_B = uniform_B.double() * cumulative_BV[:, -1]
    return torch.searchsorted(cumulative_BV, wanted_B[:, None], right=True).squeeze(1)


def uniforms(seeds: Sequence[int], num_codes: int) -> Tensor:
    """One number of [0, 1) a code, fp32 (B, num_codes): each row by a CPU generator of that image's own seed."""
    return torch.stack([torch.rand(num_codes, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
