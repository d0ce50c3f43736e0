"""Scores on Shapes by the oracle: which of the attributes that a text names are in its image, whether the text was made
of the image, as here, or the image of the text (images.py)."""

import io
import random
from collections.abc import Sequence
from typing import Any

from PIL import Image

from mmcore.data.shapes import HELD_OUT_PAIRS
from mmcore.data.shapes_oracle import (
    AttributeScore,
    DetectedObject,
    NamedObject,
    ParsedCaption,
    detect_objects,
    parse_caption,
    score_objects,
)


def score_texts(
    found: Sequence[list[DetectedObject]],
    texts: Sequence[ParsedCaption],
    scenes: Sequence[Sequence[DetectedObject | NamedObject]],
) -> tuple[list[AttributeScore], dict[str, Any]]:
    """The score of each text on what was found in its image, and of them plain JSON values, each as
    AttributeScore.as_dict: `all`; `held_out` (scenes with a colour and shape pair that is in no training image) and
    `seen` (the others); `objects` (by the number of objects of the scene); `shuffled`, what the same texts score on
    each other's images, which is chance.

    Args:
        scenes: the objects by which a text is counted, those of its image or its own.
    """
    scores = [score_objects(objects, text) for objects, text in zip(found, texts, strict=True)]
    # Each image gets the text of the next in a random order, so never its own.
    order = random.Random(0).sample(range(len(found)), len(found))
    shuffled = [score_objects(found[i], texts[j]) for i, j in zip(order, [*order[1:], order[0]], strict=True)]
    held_out = [any((item.colour, item.shape) in HELD_OUT_PAIRS for item in scene) for scene in scenes]
    numbers = [len(scene) for scene in scenes]

    def total(chosen: Sequence[bool]) -> dict[str, Any]:
        kept = [score for score, keep in zip(scores, chosen, strict=True) if keep]
        return sum(kept, start=AttributeScore()).as_dict()

    return scores, {
        "all": total([True] * len(scores)),
        "held_out": total(held_out),
        "seen": total([not each for each in held_out]),
        "objects": {str(n): total([number == n for number in numbers]) for n in sorted(set(numbers))},
        "shuffled": sum(shuffled, start=AttributeScore()).as_dict(),
    }


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
    Returns: plain JSON values: those of `score_texts`, by the objects of the image; `named_per_caption`,
        `named_per_reference`.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: at least 2 are needed, as chance is measured between them")
    found = [detect_objects(Image.open(io.BytesIO(image))) for image in images]
    scores, result = score_texts(found, [parse_caption(caption) for caption in captions], found)
    true = [
        score_objects(objects, parse_caption(reference))
        for objects, texts in zip(found, references, strict=True)
        for reference in texts
    ]
    return result | {
        "named_per_caption": sum(score.num_named for score in scores) / len(scores),
        "named_per_reference": sum(score.num_named for score in true) / max(1, len(true)),
    }
