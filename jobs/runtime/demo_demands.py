"""What the demo demands of its scores, and how it words them."""

import math
from collections.abc import Mapping
from typing import Any

MIN_CAPTIONS_CORRECT = 0.8
# A caption that names little is easily right: half of what true captions name is the least.
MIN_NAMED = 0.5
MIN_IMAGES_CORRECT = 0.75


def caption_failures(scores: Mapping[str, Any]) -> list[str]:
    """What is too low in the oracle's scores of captions, a line each; empty where all is well."""
    lines = []
    correct, named = scores["all"]["fraction_correct"], scores["named_per_caption"]
    if correct < MIN_CAPTIONS_CORRECT:
        lines.append(
            f"{_rounded_down(correct)} of the attributes that the captions name are right; "
            f"{MIN_CAPTIONS_CORRECT:.0%} are needed"
        )
    needed = MIN_NAMED * scores["named_per_reference"]
    if named < needed:
        lines.append(
            f"the captions name {named:.2f} attributes each; {needed:.2f} are needed, "
            f"{MIN_NAMED:.0%} of the {scores['named_per_reference']:.2f} of true captions"
        )
    return lines


def image_failures(scores: Mapping[str, Any]) -> list[str]:
    """The same of generated images, whose prompts name what they name."""
    correct = scores["all"]["fraction_correct"]
    if correct >= MIN_IMAGES_CORRECT:
        return []
    return [
        f"{_rounded_down(correct)} of the attributes that the prompts name are in the images; "
        f"{MIN_IMAGES_CORRECT:.0%} are needed"
    ]


def _rounded_down(fraction: float) -> str:
    """79.99 % must not be said to be the 80 % that are needed."""
    return f"{math.floor(1000 * fraction) / 10:.1f}%"


def in_words(scores: Mapping[str, Any]) -> list[str]:
    """The oracle's scores of captions or of images, in two lines."""
    return [
        f"attributes right: {scores['all']['fraction_correct']:.1%} (chance "
        f"{scores['shuffled']['fraction_correct']:.1%}); seen pairs {scores['seen']['fraction_correct']:.1%}, "
        f"pairs never seen in training {scores['held_out']['fraction_correct']:.1%}",
        f"whole scenes right: {scores['all']['whole_scene']:.1%} (chance {scores['shuffled']['whole_scene']:.1%})",
    ]
