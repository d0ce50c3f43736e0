"""Karpathy's ``dataset_flickr8k.json``, ``dataset_flickr30k.json`` and ``dataset_coco.json``.

``{"images": [{"filename", "filepath", "cocoid", "split", "sentences": [{"raw", "tokens"}]}]}``; ``filepath`` and
``cocoid`` are COCO's alone. Splits: train, val, test, and COCO's restval, the rest of its validation images, which
papers train on (Karpathy and Fei-Fei 2015, arXiv 1412.2306).
"""

from collections import Counter
from pathlib import Path
from typing import Any

from mmcore.data.caption_row import CaptionRow, as_name, as_split, one_line
from mmcore.data.json_document import has_objects, holds_keys
from mmcore.data.tables import Bad

FORM = "Karpathy's JSON"
_KEYS = (b'"sentences"', b'"images"')


def karpathy_files(folder: Path) -> list[Path]:
    """The files of `folder` that look like Karpathy's, by their keys."""
    return [path for path in sorted(folder.glob("*.json")) if holds_keys(path, _KEYS)]


def is_karpathy(document: Any) -> bool:
    """Whether the first image has sentences."""
    return has_objects(document, "images") and "sentences" in document["images"][0]


def karpathy_rows(document: dict[str, Any], location: str, bad: Bad) -> list[CaptionRow]:
    """A row an image, all of its raw sentences in it; `bad` is told of an image that lacks something.

    An image is called by its file's name, with its folder only where two folders hold one name.
    """
    counts = Counter(image.get("filename") for image in document["images"] if isinstance(image, dict))
    rows = []
    for index, image in enumerate(document["images"]):
        place = f"{location}: images[{index}]"
        name = as_name(image.get("filename")) if isinstance(image, dict) else None
        if name is None:
            bad(place, "`filename` is no name of an image")
            continue
        if counts[image["filename"]] > 1 and image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        sentences = image.get("sentences")
        raw = [each.get("raw") for each in sentences if isinstance(each, dict)] if isinstance(sentences, list) else []
        captions = [one_line(each) for each in raw if isinstance(each, str)]
        if not isinstance(sentences, list) or len(captions) < len(sentences):
            bad(place, f"{name!r}: `sentences` is no list of objects with a text `raw`")
            continue
        number = as_name(image.get("cocoid"))
        aliases = () if number is None else (number,)
        rows.append(CaptionRow(place, name, tuple(captions), as_split(image.get("split")), aliases))
    return rows
