"""Rows of a table that somebody wrote: text, CSV, JSON lines or Parquet, each row with its place in the file.

The format is found by the content first and by the ending where the content may be either. Rows are read as they are
asked for, so that a file of any length takes little memory.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.errors import InputError
from mmcore.storage import Storage

TXT, CSV, JSONL, PARQUET = "txt", "csv", "jsonl", "parquet"
ENDINGS = {".txt": TXT, ".csv": CSV, ".jsonl": JSONL, ".parquet": PARQUET}
"""Endings, in lower case, and the format that each stands for where the content may be of several."""

_BOM = b"\xef\xbb\xbf"
_PARQUET_MAGIC = b"PAR1"
_HEAD_BYTES = 2**16
# Of an object in S3, read at a time.
_S3_PART_BYTES = 2**20
_ROWS_PER_BATCH = 4096
# Between the columns of CSV: the first that stands in the header.
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
# Arrow's names of a pandas index without a name of its own; some writers keep the column and drop pandas' metadata.
_UNNAMED_INDEX = re.compile(r"__index_level_[0-9]+__")
# to_csv() heads the index with nothing, and read_csv() calls such a column this.
_UNNAMED_FIRST = ("", "Unnamed: 0")

CheckNames = Callable[[list[str], str], None]
Bad = Callable[[str, str], None]
"""Told the place and the fault of a row that is left out; it may raise."""


@dataclass(frozen=True)
class Row:
    """One row: its place (``file:line``, in Parquet ``file: row N``) and its values by name.

    CSV's values are strings, an empty field is None. Those of JSON and Parquet are as they stand there.
    """

    place: str
    values: dict[str, Any]


def refuse(place: str, reason: str) -> None:
    """The `Bad` of a file that must be right in every row: InputError."""
    raise InputError(f"{place}: {reason}")


def split_location(location: str) -> tuple[Storage, str]:
    """A file's URI as storage and name inside: s3://bucket/a/b.csv -> s3://bucket/a, b.csv."""
    parent, _, name = location.rstrip("/").rpartition("/")
    return Storage(parent), name


def open_bytes(location: str) -> BinaryIO:
    """A local file or an object (any URI with ://), to be read in parts; InputError when it cannot be read."""
    try:
        if "://" in location:
            storage, name = split_location(location)
            return cast(BinaryIO, io.BufferedReader(cast(io.RawIOBase, storage.open(name)), _S3_PART_BYTES))
        return Path(location).open("rb")
    except FileNotFoundError:
        raise InputError(f"{location}: no such file") from None
    except OSError as error:
        raise InputError(f"{location}: cannot be read: {error.strerror or error}") from None


def read_bytes(location: str) -> bytes:
    """The content of a local file or of an object (any URI with ://); InputError when it cannot be read."""
    try:
        if "://" in location:
            storage, name = split_location(location)
            return storage.read(name)
        return Path(location).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{location}: no such file") from None
    except OSError as error:
        raise InputError(f"{location}: cannot be read: {error.strerror or error}") from None


def numbered_lines(data: bytes, location: str, bad: Bad) -> list[tuple[int, str]]:
    """Number, from 1, and text of each line of UTF-8 without its line end (LF or CR LF) and without a byte order mark.

    Only LF ends a line: `str.splitlines` would also cut captions at U+2028 and its like.
    """
    lines = enumerate(data.removeprefix(_BOM).split(b"\n"), start=1)
    decoded = ((number, _decoded(line, f"{location}:{number}", number == 1, bad)) for number, line in lines)
    return [(number, text) for number, text in decoded if text is not None]


def read_lines(location: str) -> Iterator[tuple[str, str]]:
    """Place (``file:line``) and text of each line, as `numbered_lines` has them."""
    with open_bytes(location) as file:
        for number, line in enumerate(_raw_lines(file, location), start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            text = _decoded(line.removesuffix(b"\n"), place := f"{location}:{number}", number == 1, refuse)
            assert text is not None, "refused"
            yield place, text


def _raw_lines(file: BinaryIO, location: str) -> Iterator[bytes]:
    try:
        yield from file
    except OSError as error:
        raise InputError(f"{location}: cannot be read: {error.strerror or error}") from None


def _decoded(line: bytes, place: str, is_first: bool, bad: Bad) -> str | None:
    """The text of a line; None where `bad` was told of it."""
    try:
        text = line.decode("utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        bad(place, f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8")
        return None
    if is_first and "\r" in text:
        # A whole file would be one line. Further down it may stand in a quoted field.
        bad(place, "its lines end in CR alone, as on an old Mac; save the file with LF or CR LF")
        return None
    return text


def table_format(location: str) -> str | None:
    """The format of `location`; None where neither content nor ending tells it. Raises InputError: it is not there."""
    with open_bytes(location) as file:
        head = file.read(_HEAD_BYTES) or b""
    if head.startswith(_PARQUET_MAGIC):
        return PARQUET
    first_line, end, _ = head.removeprefix(_BOM).lstrip().partition(b"\n")
    if first_line.startswith(b"{"):
        try:
            # Of a line that is longer than the head no more is known than that.
            if (not end and len(head) == _HEAD_BYTES) or isinstance(json.loads(first_line), dict):
                return JSONL
        except ValueError:
            pass
    if location.lower().endswith(".json"):
        raise InputError(f"{location}: one JSON document; write JSON lines, an object a line, as `jq -c .[]` does")
    return ENDINGS.get(Path(location).suffix.lower())


def read_rows(
    location: str,
    *,
    known: Collection[str] | None = None,
    text: str = "text",
    check_names: CheckNames | None = None,
    bad: Bad | None = None,
) -> Iterator[Row]:
    """The rows of a table, one by one.

    Args:
        location: a local path or a URI.
        known: the columns that the caller has a use for; None where it has for any. See `user_columns`.
        text: name of the only value of a row of plain text, where each line that is not blank is one.
        check_names: called with the columns and their place, for JSON lines with those of each row that has others
            than the row before; it may raise InputError.
        bad: called for an invalid line of JSON and for a line of CSV with another number of fields. Such lines are then
            left out. Without it they raise InputError.

    Raises InputError that names file and line for what cannot be read.
    """
    form = table_format(location)
    if form == TXT:
        yield from _txt_rows(location, text)
    elif form == CSV:
        yield from _csv_rows(location, check_names, bad or refuse)
    elif form == JSONL:
        yield from _jsonl_rows(location, check_names, bad or refuse)
    elif form == PARQUET:
        yield from _parquet_rows(location, known, check_names)
    else:
        raise InputError(f"{location}: expected a file ending in {', '.join(ENDINGS)}")


def _txt_rows(location: str, name: str) -> Iterator[Row]:
    for place, line in read_lines(location):
        if line.strip():
            yield Row(place, {name: line.strip()})


def _csv_rows(location: str, check_names: CheckNames | None, bad: Bad) -> Iterator[Row]:
    lines = (f"{line}\n" for _, line in read_lines(location))
    # Down to the header, which tells the delimiter.
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    delimiter = _delimiter("".join(head[-1:]))
    reader = csv.reader(itertools.chain(head, lines), strict=True, delimiter=delimiter)
    # The reader's count at the end of a row is where the next one begins, as a quoted field may hold line ends.
    header: list[str] | None = None
    first, start = 0, 1
    try:
        for fields in reader:
            place, start = f"{location}:{start}", reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                first = int(len(header) > 1 and header[0] in _UNNAMED_FIRST)
                _check(header[first:], place, check_names)
                continue
            if len(fields) != len(header):
                bad(
                    place,
                    f"{len(fields)} fields where the header has {len(header)} ({delimiter.join(header)}); put a text "
                    f"with a {_DELIMITERS[delimiter]} in it into double quotes",
                )
                continue
            if first and not re.fullmatch(r"[0-9]*", fields[0]):
                raise InputError(f"{place}: {fields[0]!r} stands in a column without a name; give the column one")
            yield Row(place, {name: each or None for name, each in zip(header[first:], fields[first:], strict=True)})
    except csv.Error as error:
        raise InputError(f"{location}:{reader.line_num}: broken CSV: {error}") from None


def _delimiter(header: str) -> str:
    """A comma, or what spreadsheets write in its place, where the header holds no comma."""
    return next((each for each in _DELIMITERS if each in header), ",")


def _jsonl_rows(location: str, check_names: CheckNames | None, bad: Bad) -> Iterator[Row]:
    before: list[str] = []
    for place, line in read_lines(location):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            bad(place, f"broken JSON: {error}")
            continue
        except RecursionError:
            bad(place, "broken JSON: nested too deeply")
            continue
        if not isinstance(row, dict):
            bad(place, f'expected an object such as {{"prompt": "a dog"}}, got {line[:60]!r}')
            continue
        if (names := list(row)) != before:
            _check(names, place, check_names)
            before = names
        yield Row(place, row)


def _parquet_rows(location: str, known: Collection[str] | None, check_names: CheckNames | None) -> Iterator[Row]:
    number = 0
    try:
        with open_bytes(location) as opened, pq.ParquetFile(opened) as file:
            names, ranges = user_columns(file.schema_arrow, known), _range_indices(file.schema_arrow, known)
            _check([*names, *ranges], location, check_names)
            for batch in file.iter_batches(batch_size=_ROWS_PER_BATCH, columns=names):
                for row in batch.to_pylist():
                    counted = {name: values[number] for name, values in ranges.items()}
                    number += 1
                    yield Row(f"{location}: row {number}", {**row, **counted})
    except pa.ArrowException as error:
        raise InputError(f"{location}: broken Parquet: {str(error).splitlines()[0]}") from None


def _check(names: list[str], place: str, check_names: CheckNames | None) -> None:
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise InputError(f"{place}: two columns have the name {twice!r}; give each its own")
    if check_names is not None:
        check_names(names, place)


def user_columns(schema: pa.Schema, known: Collection[str] | None = None) -> list[str]:
    """The columns of a Parquet file without the index that pandas wrote.

    An index with a name stays where `known` holds the name or is None; one without a name is no column of anybody's.
    """
    marked = {each for each in _indices(schema) if isinstance(each, str)}
    passed_over = set() if known is None else marked.difference(known)
    return [name for name in schema.names if name not in passed_over and not _UNNAMED_INDEX.fullmatch(name)]


def _range_indices(schema: pa.Schema, known: Collection[str] | None) -> dict[str, range]:
    """An index with a name and evenly spaced numbers, which pandas writes down in its metadata and in no column."""
    return {
        each["name"]: range(each["start"], each["stop"], each["step"])
        for each in _indices(schema)
        if isinstance(each, dict) and each.get("name") and (known is None or each["name"] in known)
    }


def _indices(schema: pa.Schema) -> list[str | dict[str, Any]]:
    return (schema.pandas_metadata or {}).get("index_columns", [])
