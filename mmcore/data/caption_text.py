"""Captions as delimited text: the forms in which Flickr8k, Flickr30k and people's own captions go around.

========================================  =======================================================
``image,caption`` or no header            Kaggle's Flickr8k; the first comma splits
``image_name,comment_number,comment``     Kaggle's Flickr30k; also with `|` (results.csv)
``NAME#k TAB caption``                    Flickr8k.token.txt and results_20130124.token, as their authors gave them
any header with known columns             comma, tab, `|` or `;` between them
========================================  =======================================================

The caption is as a rule the last column, which then needs no quotation marks, whatever it holds.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmcore.data.caption_columns import NUMBER_COLUMN, Columns, find_columns, is_column_name
from mmcore.images import IMAGE_SUFFIXES

DELIMITERS = {",": "comma", "\t": "tab", "|": "`|`", ";": "`;`"}
_ENDINGS = "|".join(map(re.escape, IMAGE_SUFFIXES))
IMAGE_FILE = re.compile(rf"(?P<stem>.+)(?:{_ENDINGS})", re.IGNORECASE)
# `a.jpg#0` numbers a caption; one image of Flickr8k is called `2258277193_586949ec62.jpg.1` there and `.jpg` on disk.
_NUMBERED_NAME = re.compile(rf"(?P<name>.+(?:{_ENDINGS}))(?P<copy>\.\d+)?(?P<number>#\d+)?", re.IGNORECASE)
_NUMBER = re.compile(r"\s*\d{1,3}\s*")
# `2199200615.jpg| 4   A dog runs across the grass .`: one row of Flickr30k's results.csv lacks its second `|`.
_UNDIVIDED = re.compile(r"\s*(?P<number>\d{1,3})\s{2,}(?P<caption>\S.*)")
_HEADERLESS = ("image", "caption")
_WITH_NUMBER = ("image", NUMBER_COLUMN, "caption")


@dataclass(frozen=True)
class Layout:
    """How a file of captions is laid out.

    Attributes:
        delimiter: what stands between two columns.
        names: its columns; where it has no header, what they would be called.
        columns: which of them is what.
        has_header: the first line that is not blank holds the names.
        has_quotes: the text is CSV's, where quotation marks around a field are no part of it.
    """

    delimiter: str
    names: tuple[str, ...]
    columns: Columns
    has_header: bool
    has_quotes: bool

    @property
    def caption_is_last(self) -> bool:
        """The text goes on to the end of the line, so that it may hold the delimiter."""
        return self.columns.captions == self.names[-1:]

    @property
    def row(self) -> str:
        """What a row looks like: `image,caption`."""
        return self.delimiter.join(self.names)

    def described(self) -> str:
        header = "" if self.has_header else "no header, "
        return header + self.columns.described(f", {DELIMITERS[self.delimiter]} between columns")

    def fields(self, line: str) -> list[str] | None:
        """The fields of a row, as many as there are columns; None where the line has another number of them."""
        if not self.caption_is_last:
            try:
                fields = next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True, strict=True), [])
            except csv.Error:
                return None
            return [field.strip() for field in fields] if len(fields) == len(self.names) else None
        raw = self.raw_fields(line)
        return None if raw is None else [*raw[:-1], self.caption(raw[-1])]

    def raw_fields(self, line: str) -> list[str] | None:
        """`fields` where the caption is the last column, which keeps its quotation marks."""
        fields, rest = [], line
        for name in self.names[1:]:
            before = rest
            field, found, rest = _first_field(rest, self.delimiter)
            if not found:
                undivided = _UNDIVIDED.fullmatch(before) if self.delimiter == "|" else None
                is_number = name == self.names[-1] and self.names[-2].strip().lower() == NUMBER_COLUMN
                if undivided is None or not is_number:
                    return None
                field, rest = undivided["number"], undivided["caption"]
            fields.append(field)
        return [*fields, rest]

    def caption(self, text: str) -> str:
        """What the last field of a row says."""
        return (unquote(text) if self.has_quotes else text).strip()


def _first_field(line: str, delimiter: str) -> tuple[str, bool, str]:
    """The field before the first delimiter, whether there is one, and what follows it."""
    quoted = re.match(rf'\s*"((?:[^"]|"")*)"\s*{re.escape(delimiter)}', line)
    if quoted:
        return quoted[1].replace('""', '"').strip(), True, line[quoted.end() :]
    field, found, rest = line.partition(delimiter)
    return field.strip(), bool(found), rest


def unquote(text: str) -> str:
    """A CSV field's content: without the quotes around it where it is quoted as a whole, "" as one quote.

    Writers of CSV quote each caption that holds a comma. A text that merely begins and ends
    with a quoted word (`"a" or "b"`) is not a quoted field and stays.
    """
    text = text.strip()
    if len(text) >= 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1].replace('""', ""):
        return text[1:-1].replace('""', '"')
    return text


def image_name(field: str) -> str:
    """The file's name without the number of a caption: `a.jpg#0` and `a.jpg.1#0` are of `a.jpg`."""
    match = _NUMBERED_NAME.fullmatch(field)
    return match["name"] if match and (match["copy"] or match["number"]) else field


def is_image_name(field: str) -> bool:
    """Whether `field` has the ending of an image's file, or that and the number of a caption."""
    return _NUMBERED_NAME.fullmatch(field) is not None


def find_layout(lines: Sequence[str], place: str) -> Layout:
    """The layout of a file's `lines`. Raises InputError for a header whose columns are not known."""
    filled = [line for line in lines if line.strip()]
    first = filled[0] if filled else ""
    header = _header(first)
    if header is not None:
        delimiter, names = header
        columns = find_columns(names, place)
        return Layout(delimiter, names, columns, True, has_quotes=delimiter != "|")
    delimiter = _delimiter(first)
    names = _HEADERLESS
    layout = Layout(delimiter, names, find_columns(names, place), False, has_quotes=delimiter in ",;")
    rows = [fields for line in filled if (fields := layout.fields(line)) is not None]
    of_images = [is_image_name(fields[0]) for fields in rows]
    if len(rows) > 1 and not of_images[0] and all(of_images[1:]) and layout.fields(first) is not None:
        find_columns([name.strip() for name in first.split(delimiter)], place)
    named = [fields[1].partition(delimiter) for fields, has_name in zip(rows, of_images, strict=True) if has_name]
    if (
        named
        and all(number and found for number, found, _ in named)
        and all(_NUMBER.fullmatch(number) for number, _, _ in named)
    ):
        return replace(layout, names=_WITH_NUMBER, columns=find_columns(_WITH_NUMBER, place))
    return layout


def _header(line: str) -> tuple[str, tuple[str, ...]] | None:
    """Delimiter and names of the columns where `line` is a header."""
    for delimiter in DELIMITERS:
        fields = [field.strip().strip('"').strip() for field in line.split(delimiter)]
        if len(fields) > 1 and any(map(is_column_name, fields)) and not is_image_name(fields[0]):
            return delimiter, tuple(fields)
    return None


def _delimiter(line: str) -> str:
    """The one that ends the first field of a file without a header."""
    found = {line.index(delimiter): delimiter for delimiter in DELIMITERS if delimiter in line}
    return found[min(found)] if found else ","
