"""Captions to be scored, of any file of captions; delimited text may have captions of several lines."""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mmcore.data.caption_files import read_caption_file
from mmcore.data.caption_row import NUL, CaptionRow
from mmcore.data.caption_text import Layout, find_layout, image_name, is_image_name
from mmcore.data.json_document import read_document
from mmcore.data.tables import (
    JSONL,
    PARQUET,
    numbered_lines,
    read_bytes,
    refuse,
    split_location,
    table_format,
)
from mmcore.errors import InputError
from mmcore.storage import Storage


@dataclass(frozen=True)
class Predictions:
    """Captions in file order, as (image as the file names it, caption)."""

    location: str
    sha256: str
    captions: list[tuple[str, str]]


def read_predictions(location: str, known_names: Collection[str]) -> Predictions:
    """A file's or a Parquet folder's predictions.

    Args:
        location: local path or URI. A folder holds Parquet parts, which count in the order of their names.
        known_names: names of the known images, by file and by id; in text they tell a new caption from the next line
            of the one before.

    Raises:
        InputError: unreadable, empty or malformed; the message names the file, and the line where it can.
    """
    if "://" in location:
        storage, name = split_location(location)
        is_file = not location.endswith("/") and storage.exists(name)
    else:
        is_file = Path(location).is_file()
    names = [] if is_file else Storage(location).list(".parquet")
    if not names and Path(location).is_dir():
        raise InputError(f"{location}: a folder without *.parquet; name a file or the folder of the parts")

    digest = hashlib.sha256()
    captions: list[tuple[str, str]] = []
    for source in [f"{location.rstrip('/')}/{name}" for name in names] or [location]:
        data = read_bytes(source)
        digest.update(data)
        if read_document(source) is not None or table_format(source) in (JSONL, PARQUET):
            captions.extend(_only_caption(row) for row in read_caption_file(source).rows)
        else:
            captions.extend(_parse_text(data, source, known_names))
    if not captions:
        raise InputError(f"{location}: holds no predictions")
    return Predictions(location, digest.hexdigest(), captions)


def _only_caption(row: CaptionRow) -> tuple[str, str]:
    if len(row.captions) != 1:
        raise InputError(f"{row.place}: {len(row.captions)} captions for {row.image!r}; predict one an image")
    return row.image, row.captions[0]


def _parse_text(data: bytes, location: str, known_names: Collection[str]) -> list[tuple[str, str]]:
    lines = numbered_lines(data, location, refuse)
    start = f"{location}:{next((number for number, line in lines if line.strip()), 1)}"
    layout = find_layout([line for _, line in lines], start)
    if not layout.caption_is_last:
        return [_only_caption(row) for row in read_caption_file(location).rows]
    return _parse_lines(lines, layout, location, known_names)


def _parse_lines(
    lines: list[tuple[int, str]], layout: Layout, location: str, known_names: Collection[str]
) -> list[tuple[str, str]]:
    """Join lines that do not begin with an image name to the caption before them.

    Language models often answer in several lines. For unknown names the code must guess. A wrong "image name" ends in
    the error of an unknown image. A wrong "next line" would silently drop an image and change another caption. So the
    guess prefers "image name":

    * The name of an image file always counts, known or not.
    * In a file whose first line names an image without its ending, any known name counts. So does a word with a digit
      that is as long as the known names (`1000268201_693b08cb0e`).
    * In a file of file names, a known name without its ending counts only with a digit. `dog, running` continues a
      caption even if dog.jpg exists.
    """
    shortest = min(map(len, known_names), default=0)
    with_ending = False

    def begins_caption(name: str) -> bool:
        if is_image_name(name):
            return True
        has_digit = any(character.isdigit() for character in name)
        if name in known_names:
            return has_digit or not with_ending
        return has_digit and not with_ending and len(name) >= shortest and len(name.split()) == 1

    assert layout.columns.image is not None
    position = layout.names.index(layout.columns.image)
    entries: list[tuple[str, list[str]]] = []
    header = layout.has_header
    for number, line in lines:
        if not entries and not line.strip():
            continue
        if header:
            header = False
            continue
        if "\0" in line:
            raise InputError(f"{location}:{number}: {NUL}")
        # With its quotation marks: where they end is known when the whole caption is.
        fields = layout.raw_fields(line)
        name = fields[position] if fields is not None else ""
        if fields is not None and (begins_caption(name) or not entries):
            with_ending = with_ending or (not entries and is_image_name(name))
            entries.append((image_name(name), [fields[-1]]))
        elif entries and not (fields is None and is_image_name(line.partition(layout.delimiter)[0].strip())):
            entries[-1][1].append(line)
        else:
            # Whatever the first line begins with has to be an image: there is no caption to go on with.
            raise InputError(f"{location}:{number}: expected `{layout.row}`, got {line[:60]!r}")
    return [(name, layout.caption("\n".join(parts))) for name, parts in entries]
