"""Files of captions: delimited text, JSON, JSON lines or Parquet, told apart by content; every row with its place."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mmcore.data import coco, karpathy
from mmcore.data.caption_columns import Columns, find_columns
from mmcore.data.caption_row import NUL, CaptionRow, as_captions, as_name, as_split
from mmcore.data.caption_text import Layout, find_layout, image_name
from mmcore.data.json_document import document_rows, read_document
from mmcore.data.tables import (
    JSONL,
    PARQUET,
    Bad,
    CheckNames,
    Row,
    numbered_lines,
    read_bytes,
    read_rows,
    refuse,
    table_format,
)
from mmcore.errors import InputError


@dataclass(frozen=True)
class CaptionFile:
    """The rows in file order, and `form`: what the file was read as, in words."""

    form: str
    rows: list[CaptionRow]


def read_caption_file(location: str, bad: Bad = refuse, *, keep_quotes: bool = False) -> CaptionFile:
    """Read a local file or URI.

    With `keep_quotes` a line is split at its first comma. The rest is the caption, including CSV's quotation marks, as
    in the report's code for captions.txt. A file with other columns is refused.
    Raises InputError for a file that cannot be read or whose columns are not known.
    """
    document = None if keep_quotes else read_document(location)
    if document is not None:
        return _read_document(document, location, bad)
    form = table_format(location)
    if form in (JSONL, PARQUET) and not keep_quotes:
        return _read_table(
            lambda check: read_rows(location, check_names=check, bad=bad),
            {JSONL: "JSON lines", PARQUET: "Parquet"}[form],
            bad,
        )
    lines = numbered_lines(read_bytes(location), location, bad)
    start = f"{location}:{next((number for number, line in lines if line.strip()), 1)}"
    layout = find_layout([line for _, line in lines], start)
    if keep_quotes:
        if form in (JSONL, PARQUET) or layout.delimiter != "," or len(layout.names) != 2 or not layout.caption_is_last:
            raise InputError(f"{start}: not `image,caption` lines, which alone the report's code reads")
        layout = replace(layout, has_quotes=False)
    return CaptionFile(layout.described(), _without_nul(_text_rows(lines, layout, location, bad), bad))


def _text_rows(lines: list[tuple[int, str]], layout: Layout, location: str, bad: Bad) -> Iterator[CaptionRow]:
    filled = [(number, line) for number, line in lines if line.strip()]
    for number, line in filled[int(layout.has_header) :]:
        place = f"{location}:{number}"
        fields = layout.fields(line)
        if fields is None:
            bad(place, f"expected `{layout.row}`, got {line[:60]!r}")
            continue
        value = {name: fields[index] for index, name in enumerate(layout.names)}
        columns = layout.columns
        assert columns.image is not None
        captions = tuple(value[name] for name in columns.captions)
        if (
            layout.has_quotes
            and layout.caption_is_last
            and captions[-1].startswith('"')
            and captions[-1].count('"') % 2
        ):
            bad(place, "the quotation mark before the caption is not closed; put the whole caption on one line")
            continue
        split = as_split(value[columns.split]) if columns.split else None
        yield CaptionRow(place, image_name(value[columns.image]), captions, split)


def _read_document(document: Any, location: str, bad: Bad) -> CaptionFile:
    if karpathy.is_karpathy(document):
        return CaptionFile(karpathy.FORM, _without_nul(karpathy.karpathy_rows(document, location, bad), bad))
    if coco.is_coco(document):
        return CaptionFile(coco.FORM, _without_nul(coco.coco_rows(document, location, bad), bad))

    def rows(check: CheckNames) -> Iterator[Row]:
        before: list[str] = []
        for row in document_rows(document, location, bad):
            if (names := list(row.values)) != before:
                check(names, row.place)
                before = names
            yield row

    return _read_table(rows, "JSON", bad)


def _read_table(rows_of: Callable[[CheckNames], Iterable[Row]], form: str, bad: Bad) -> CaptionFile:
    """`rows_of` calls back with the names of columns where they change."""
    found: list[Columns | None] = []

    def look(names: list[str], place: str) -> None:
        try:
            found.append(find_columns(names, place))
        except InputError as error:
            if not found:
                raise
            # One line of JSON among others.
            bad(place, str(error).removeprefix(f"{place}: "))
            found.append(None)

    rows = []
    for row in rows_of(look):
        columns = found[-1]
        if columns is None:
            continue
        assert columns.image is not None
        image = as_name(row.values[columns.image])
        captions = as_captions([row.values[name] for name in columns.captions])
        split = as_split(row.values[columns.split]) if columns.split else None
        if image is None:
            bad(
                row.place, f"{columns.image}: expected the name of an image, got {repr(row.values[columns.image])[:60]}"
            )
        elif captions is None:
            bad(row.place, f"{' and '.join(columns.captions)}: expected text, got {_shown(row.values, columns)}")
        else:
            rows.append(CaptionRow(row.place, image, captions, split))
    return CaptionFile(f"{form}, {found[0].described()}" if found and found[0] else form, _without_nul(rows, bad))


def _without_nul(rows: Iterable[CaptionRow], bad: Bad) -> list[CaptionRow]:
    """The rows whose captions can be written down wherever a prompt can."""
    kept = []
    for row in rows:
        if any("\0" in caption for caption in row.captions):
            bad(row.place, NUL)
        else:
            kept.append(row)
    return kept


def _shown(values: dict[str, Any], columns: Columns) -> str:
    return " and ".join(repr(values[name])[:60] for name in columns.captions)
