"""Scores on Shapes by the oracle: the share of the attributes named in a text that are correct in its image.

Captions of images are scored here, images of prompts in images.py.
"""

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
    """Score each text on the objects found in its image.

    Args:
        found: the objects found in each image.
        texts: the text of each image.
        scenes: the objects that assign a pair to a group below: those of the image, or those of the text.
    Returns: the score of each pair, and JSON values, each from AttributeScore.as_dict:
        `all`: over all pairs.
        `held_out`: scenes with a pair of colour and shape that no training image has; `seen`: the other scenes.
        `objects`: by the number of objects in the scene.
        `shuffled`: the same texts on other images, which is chance.
    """
    scores = [score_objects(objects, text) for objects, text in zip(found, texts, strict=True)]
    # In a random cyclic order each image gets the text of the next one, never its own.
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
    """Score one caption per image.

    A caption with few attributes is easily correct. The result therefore also has the number of attributes per caption
    (`named_per_caption`) and per reference (`named_per_reference`).

    Args:
        images: encoded images, at least two.
        captions: the caption of each image.
        references: the true captions of each image.
    Returns: JSON values: those of `score_texts` with the objects of the images, `named_per_caption` and
        `named_per_reference`.
    """
    if len(images) < 2:
        raise ValueError(f"{len(images)} images: at least 2 are needed to measure chance")
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
