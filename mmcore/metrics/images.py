"""Scores of generated images: by the oracle on Shapes, by the named colour on photographs.

Images are uint8 (H, W, 3).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcore.data.shapes_oracle import detect_objects, parse_caption
from mmcore.errors import InputError
from mmcore.metrics.shapes import score_texts

# The sRGB values of colour words in CSS.
COLOUR_WORDS: dict[str, tuple[int, int, int]] = {
    "pink": (255, 192, 203),
    "black": (0, 0, 0),
    "green": (0, 128, 0),
    "red": (255, 0, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "white": (255, 255, 255),
    "orange": (255, 165, 0),
    "purple": (128, 0, 128),
    "brown": (165, 42, 42),
}
# Linear sRGB -> CIE XYZ relative to white (D65), from IEC 61966-2-1.
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_TO_XYZ /= _TO_XYZ.sum(axis=1, keepdims=True)


def score_shapes(images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str]) -> dict[str, Any]:
    """The share of the prompts' attributes that are correct in the images.

    Returns: JSON values: those of `score_texts` with the objects of the prompts, and `named_per_prompt`.

    Raises InputError for fewer than two images, or a prompt without a shape.
    """
    parsed = [parse_caption(prompt) for prompt in prompts]
    for prompt, each in zip(prompts, parsed, strict=True):
        if not each.objects:
            raise InputError(f"prompt {prompt!r}: names no shape; the oracle reads only prompts of the Shapes data")
    if len(prompts) < 2:
        raise InputError(f"{len(prompts)} image: at least 2 are needed to measure chance")
    found = [detect_objects(image) for image in images]
    scores, result = score_texts(found, parsed, [each.objects for each in parsed])
    return result | {"named_per_prompt": sum(score.num_named for score in scores) / len(scores)}


def to_lab(rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """sRGB (..., 3) -> CIE L*a*b* (..., 3): lightness 0 to 100, green to red, blue to yellow."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def words_of(text: str) -> set[str]:
    """The set of lower-cased words of `text`."""
    return set(re.findall(r"[a-z]+", text.lower()))


def named_colour(prompt: str, colours: Sequence[str]) -> str:
    """The one of `colours` that is a word of `prompt`. Raises InputError for none or several."""
    named = sorted(words_of(prompt) & set(colours))
    if len(named) != 1:
        raise InputError(
            f"prompt {prompt!r}: names {' and '.join(named) or 'none'} of {', '.join(colours)}; name exactly one"
        )
    return named[0]


def score_colours(
    images: Iterable[npt.NDArray[np.uint8]], prompts: Sequence[str], colours: Sequence[str]
) -> dict[str, Any]:
    """How often the mean colour of an image points to the colour that its prompt names, not to another one.

    The mean colour of most photographs is close to grey. An image is therefore compared with the average of the sweep,
    in which all colours have equal weight. Each of `colours` has a direction in L*a*b* from the average of `colours`.
    The chosen colour is the one whose direction is closest to the image's. Images that do not depend on the prompt
    score 1 / `len(colours)` on average.

    Returns: JSON values.
        `fraction_correct`, and `chance`.
        `fraction_nearest`: share of the images whose mean colour itself is nearest to the named colour. It does not
        depend on other images. On grey photographs it is low for all but the darkest colours.
        `colours`: for each colour its `num_images`, their `fraction_correct` and how often each colour was `chosen`.
        Also the mean `lightness`, `chroma` and `hue` of its images (degrees: red 40, yellow 103, green 136, blue 306).

    Raises InputError for an unknown colour, fewer than two colours, or a colour that no prompt names.
    """
    unknown = [colour for colour in colours if colour not in COLOUR_WORDS]
    if unknown or len(set(colours)) != len(colours) or len(colours) < 2:
        raise InputError(f"colours {', '.join(colours)}: give two or more different ones of {', '.join(COLOUR_WORDS)}")
    named = np.array([colours.index(named_colour(prompt, colours)) for prompt in prompts])
    missing = [colour for number, colour in enumerate(colours) if number not in named]
    if missing:
        raise InputError(f"colours {', '.join(colours)}: no prompt names {', '.join(missing)}")
    mean_N3 = np.array([to_lab(image).mean(axis=(0, 1)) for image in images])
    of_colour_C3 = np.array([mean_N3[named == number].mean(axis=0) for number in range(len(colours))])
    reference_C3 = to_lab(np.array([COLOUR_WORDS[colour] for colour in colours], np.uint8))
    direction_C3 = reference_C3 - reference_C3.mean(axis=0)
    direction_C3 /= np.linalg.norm(direction_C3, axis=1, keepdims=True)
    chosen = ((mean_N3 - of_colour_C3.mean(axis=0)) @ direction_C3.T).argmax(axis=1)
    nearest = np.linalg.norm(mean_N3[:, None] - reference_C3, axis=2).argmin(axis=1)
    result = {}
    for number, colour in enumerate(colours):
        mine, (lightness, a, b) = chosen[named == number], of_colour_C3[number]
        counts = Counter(mine.tolist())
        result[colour] = {
            "num_images": len(mine),
            "fraction_correct": float((mine == number).mean()),
            "chosen": {other: counts[index] for index, other in enumerate(colours)},
            "lightness": float(lightness),
            "chroma": float(np.hypot(a, b)),
            "hue": float(np.degrees(np.arctan2(b, a)) % 360),
        }
    return {
        "fraction_correct": float((chosen == named).mean()),
        "fraction_nearest": float((nearest == named).mean()),
        "chance": 1 / len(colours),
        "num_images": len(named),
        "colours": result,
    }
