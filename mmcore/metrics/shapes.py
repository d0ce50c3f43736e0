"""Scores of captions on Shapes by the oracle: which of the attributes that they name are right in their image."""

import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmcore.data.shapes import HELD_OUT_PAIRS
from mmcore.data.shapes_oracle import AttributeScore, detect_objects, parse_caption, score_objects


def score_captions(
    images: Sequence[bytes], captions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """Score one caption an image.

    A caption that names little is easily right, so `named_per_caption` stands beside what true captions name
    (`named_per_reference`). Chance (`shuffled`) is what the same captions score on other images.

    Args:
        images: encoded, at least two.
        captions: the caption of each image.
        references: the true captions of each image.
    Returns: plain JSON values: `all`, `held_out` (images with a colour and shape pair that is in no training
        image), `seen` (the others) and `shuffled`, each as AttributeScore.as_dict; `objects` (the same by the
        number of objects); `named_per_caption`, `named_per_reference`; `whole_scene` of each image as booleans.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: at least 2 are needed, as chance is measured between them")
    found = [detect_objects(Image.open(io.BytesIO(image))) for image in images]
    parsed = [parse_caption(caption) for caption in captions]
    scores = [score_objects(objects, caption) for objects, caption in zip(found, parsed, strict=True)]
    # Each image gets the caption of the next in a random order, so never its own.
    order = random.Random(0).sample(range(len(found)), len(found))
    shuffled = [score_objects(found[i], parsed[j]) for i, j in zip(order, [*order[1:], order[0]], strict=True)]
    true = [
        score_objects(objects, parse_caption(reference))
        for objects, texts in zip(found, references, strict=True)
        for reference in texts
    ]
    held_out = [any((item.colour, item.shape) in HELD_OUT_PAIRS for item in objects) for objects in found]

    def total(chosen: Sequence[bool]) -> dict[str, Any]:
        kept = [score for score, keep in zip(scores, chosen, strict=True) if keep]
        return sum(kept, start=AttributeScore()).as_dict()

    return {
        "all": total([True] * len(scores)),
        "held_out": total(held_out),
        "seen": total([not each for each in held_out]),
        "objects": {str(n): total([len(objects) == n for objects in found]) for n in sorted({len(o) for o in found})},
        "shuffled": sum(shuffled, start=AttributeScore()).as_dict(),
        "named_per_caption": sum(score.num_named for score in scores) / len(scores),
        "named_per_reference": sum(score.num_named for score in true) / max(1, len(true)),
        "whole_scene": [score.whole_scene == 1.0 for score in scores],
    }
