"""One JSON document of captions, told apart by its content.

=======================================================  ====================================================
``{"images": [{"filename", "split", "sentences"}]}``      Karpathy's, karpathy.py
``{"images": [...], "annotations": [{"caption"}]}``       COCO's, coco.py
``[{"image": "a.jpg", "caption": "..."}]``                a list of rows, such as the results that COCO's server takes
``{"a.jpg": "..."}``, ``{"a.jpg": ["...", "..."]}``       an object by names
=======================================================  ====================================================
"""

import json
import mmap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from mmcore.data.caption_columns import is_column_name
from mmcore.data.tables import Bad, Row, read_bytes
from mmcore.errors import InputError

ENDING = ".json"
_BOM = "\ufeff"
_LISTED = 6


def read_document(location: str) -> Any | None:
    """The document of a file that ends in ``.json``; None for another file, and for JSON lines in one.

    Raises InputError that names the line where it is no JSON.
    """
    if not location.lower().endswith(ENDING):
        return None
    try:
        text = read_bytes(location).decode("utf-8").removeprefix(_BOM)
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        # The first object ends and a second follows: JSON lines, whose reader names a line that is broken.
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return None
        raise InputError(f"{location}:{error.lineno}: broken JSON: {error.msg}; write the file anew") from None
    except RecursionError:
        raise InputError(f"{location}: broken JSON: nested too deeply") from None
    # One object with the fields of a row is JSON lines of one line.
    is_row = isinstance(document, dict) and "\n" not in text.strip() and any(map(is_column_name, document))
    return None if is_row else document


def document_rows(document: Any, location: str, bad: Bad) -> Iterator[Row]:
    """The rows of a list of objects, or of an object that has captions by the names of images.

    `bad` is told of an element of a list that is no object. Raises InputError for another document.
    """
    if isinstance(document, list):
        for index, element in enumerate(document):
            place = f"{location}: [{index}]"
            if isinstance(element, dict):
                yield Row(place, element)
            else:
                bad(place, f'expected an object such as {{"image": "a.jpg", "caption": "a dog"}}, got {element!r:.60}')
        return
    if isinstance(document, dict) and any(document.values()) and all(map(_are_captions, document.values())):
        for name, captions in document.items():
            yield Row(f"{location}: {name!r}", {"image": name, "captions": captions})
        return
    is_object = isinstance(document, dict)
    keys = f"an object of {', '.join(map(repr, list(document)[:_LISTED]))}" if is_object else "no object"
    raise InputError(
        f"{location}: {keys}, not a known form of captions; known are Karpathy's (`images` with `sentences`), COCO's "
        '(`images` and `annotations` with `caption`), [{"image": "a.jpg", "caption": "a dog"}] and {"a.jpg": "a dog"}'
    )


def _are_captions(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def has_objects(document: Any, name: str) -> bool:
    """Whether the document is an object with a list of objects under `name`."""
    values = document.get(name) if isinstance(document, dict) else None
    return isinstance(values, list) and bool(values) and isinstance(values[0], dict)


def holds_keys(path: Path, keys: Collection[bytes]) -> bool:
    """Whether all of `keys` stand in the file, which may be too large to be parsed only to be told from others."""
    if path.name.startswith(".") or not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return all(data.find(key) >= 0 for key in keys)
