"""The captioner on CLIP's image encoder (report, Table 1, row 2): the model is `mmcore.captioners.cross_attention`.

CLIP: Radford et al. 2021, https://arxiv.org/abs/2103.00020
"""

import dataclasses

from mmcore.captioners import cross_attention
from mmcore.captioners.cross_attention import CrossAttentionCaptionerRecipe

CLIP = "openai/clip-vit-base-patch32"

# The report's decoder saw CLIP's pooled vector as its only image token.
_REPORT = dataclasses.replace(cross_attention.VARIANTS["report"], encoder=CLIP, tokens="pooled")
_BEST = dataclasses.replace(cross_attention.VARIANTS["best"], encoder=CLIP)
VARIANTS: dict[str, CrossAttentionCaptionerRecipe] = {
    "report": _REPORT,
    "best": _BEST,
    # Without a network there is no CLIP: these train the small encoder of `cross_attention`.
    "shapes": cross_attention.VARIANTS["shapes"],
    "smoke": cross_attention.VARIANTS["smoke"],
}
