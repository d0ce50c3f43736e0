"""Matches predicted captions to images and checks that the set is complete.

The key is the image_id: the image's file name without its ending. A file of predictions may use the file name or the
image_id.
"""

from collections.abc import Collection, Iterable

from mmcore.data.predictions import Predictions
from mmcore.data.references import References
from mmcore.errors import InputError

NUM_LISTED = 5


def listed(names: Iterable[str]) -> str:
    """The first five names, quoted, and the number of further names."""
    names = list(names)
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(repr(name) for name in names[:NUM_LISTED]) + more


def match_predictions(
    predictions: Predictions, references: References, expected: Collection[str] | None = None
) -> dict[str, str]:
    """image_id -> predicted caption, in the order of the predictions.

    Args:
        predictions: the predictions to score.
        references: the known images.
        expected: the exact set of image_ids that must have a prediction; None allows any set.

    Raises:
        InputError: a prediction for an unknown image, two for one image, or a set that differs from `expected`. The
            message lists the first five.
    """
    unknown = [name for name, _ in predictions.captions if name not in references.image_ids]
    if unknown:
        raise InputError(
            f"{predictions.location}: {len(unknown)} predictions are for images that are not in "
            f"{references.location}: {listed(unknown)}"
        )
    captions: dict[str, str] = {}
    twice: dict[str, None] = {}
    for name, caption in predictions.captions:
        image_id = references.image_ids[name]
        if image_id in captions:
            twice[name] = None
        captions[image_id] = caption
    if twice:
        raise InputError(f"{predictions.location}: {len(twice)} images have more than one prediction: {listed(twice)}")
    if expected is not None:
        missing = [image_id for image_id in expected if image_id not in captions]
        if missing:
            raise InputError(
                f"{predictions.location}: {len(missing)} of the split's {len(expected)} images have no "
                f"prediction: {listed(missing)}"
            )
        wanted = set(expected)
        outside = [image_id for image_id in captions if image_id not in wanted]
        if outside:
            raise InputError(
                f"{predictions.location}: {len(outside)} predictions are for images outside the split: "
                f"{listed(outside)}"
            )
    return captions
