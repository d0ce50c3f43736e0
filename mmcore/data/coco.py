"""COCO's captions: ``captions_train2014.json``, ``captions_val2017.json`` and what follows their form.

``{"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}`` (cocodataset.org/#format-data).
The split is that of the file's name; the images lie in folders such as ``train2017/`` near ``annotations/``.
"""

from pathlib import Path
from typing import Any

from mmcore.data.caption_row import CaptionRow, as_name, one_line
from mmcore.data.json_document import has_objects, holds_keys
from mmcore.data.splits import split_in
from mmcore.data.tables import Bad

FORM = "COCO's captions"
_KEYS = (b'"annotations"', b'"image_id"', b'"caption"')
# Beside them lie instances_*.json of 450 MB.
_PATTERN = "*caption*.json"


def coco_files(folder: Path) -> list[Path]:
    """The files of `folder` that look like COCO's captions, by their names and keys."""
    return [path for path in sorted(folder.glob(_PATTERN)) if holds_keys(path, _KEYS)]


def is_coco(document: Any) -> bool:
    """Whether it has images and annotations that are captions."""
    return (
        has_objects(document, "images")
        and has_objects(document, "annotations")
        and "caption" in document["annotations"][0]
    )


def coco_rows(document: dict[str, Any], location: str, bad: Bad) -> list[CaptionRow]:
    """A row an image that has captions, in the order of the images and of their annotations.

    `bad` is told of an image without a name, and of an annotation without a text or of an unknown image.
    """
    split = split_in(location)
    names: dict[Any, str] = {}
    places: dict[Any, str] = {}
    for index, image in enumerate(document["images"]):
        place = f"{location}: images[{index}]"
        name = as_name(image.get("file_name")) if isinstance(image, dict) else None
        number = as_name(image.get("id")) if isinstance(image, dict) else None
        if name is None or number is None:
            bad(place, "`id` and `file_name` do not name an image")
        elif number in names:
            bad(place, f"`id` {number} is that of {places[number].rpartition(': ')[2]} too")
        else:
            names[number], places[number] = name, place
    captions: dict[str, list[str]] = {}
    for index, annotation in enumerate(document["annotations"]):
        place = f"{location}: annotations[{index}]"
        number = as_name(annotation.get("image_id")) if isinstance(annotation, dict) else None
        if number not in names:
            bad(place, f"`image_id` {number} is no `id` of its images")
        elif not isinstance(annotation.get("caption"), str):
            bad(place, f"`caption` is no text: {annotation.get('caption')!r:.60}")
        else:
            captions.setdefault(str(number), []).append(one_line(annotation["caption"]))
    return [
        CaptionRow(places[number], name, tuple(captions[number]), split, (number,))
        for number, name in names.items()
        if number in captions
    ]
