"""What sources call their splits, and what the prepared data call them."""

import re
from collections.abc import Iterable
from pathlib import PurePath

from mmcore.data.prepared import TEST, TRAIN, VALIDATION

UNUSED = "unused"
SPLIT_NAMES = {
    "train": TRAIN,
    "training": TRAIN,
    # Karpathy's rest of COCO's validation images, which papers train on.
    "restval": TRAIN,
    "validation": VALIDATION,
    "valid": VALIDATION,
    "val": VALIDATION,
    "dev": VALIDATION,
    "test": TEST,
    "testing": TEST,
}
"""A source's name of a split, in lower case, and ours."""


def known_split(name: str | None) -> str | None:
    """train, validation or test, None where the source's `name` is not known."""
    return SPLIT_NAMES.get((name or "").strip().lower())


def split_in(path: str) -> str | None:
    """The source's name of the split that a file is called by, or else its folder; None where neither names one.

    ``captions_val2014.json`` -> val; ``test/0.tar`` -> test; ``data/train-00000-of-00002.parquet`` -> train.
    """
    pure = PurePath(path)
    for part in (pure.name, pure.parent.name):
        for word in re.findall(r"[a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return word
    return None


def are_several(names: Iterable[str | None]) -> bool:
    """Whether the names split anything: a file or folder `train` alone is how people name the only one."""
    return len({known_split(name) for name in names} - {None}) > 1
