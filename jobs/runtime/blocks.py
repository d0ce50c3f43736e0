"""The rows of a sweep in order, cut into blocks that are worked on and committed one by one."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, final, overload

from mmcore.storage import Storage

# More files than this make listing and reading a finished sweep slow.
MAX_BLOCKS = 10_000
ROWS_PER_BLOCK = 64
# Rows whose JSON is held at once while the digest of a plan is made.
DIGEST_ROWS = 4096

Columns = dict[str, list[Any]]
"""The rows of a block as equally long lists of JSON values, by name."""


class ImageFiles(TypedDict):
    """Image files by their names in the source, and which of them are no longer there."""

    files: list[str]
    gone: list[str]


class ShardRows(TypedDict):
    """A Parquet shard by its name in the source, one of its row groups, and the numbers of rows in that."""

    shard: str
    row_group: int
    rows: list[int]


@final
class FilesItem(ImageFiles):
    """A block of image files."""

    block: int


@final
class ShardItem(ShardRows):
    """A block of rows of a Parquet shard."""

    block: int


@final
class ColumnsItem(TypedDict):
    """A block that holds its rows itself."""

    block: int
    columns: Columns


SourceItem = FilesItem | ShardItem
"""A block whose rows lie in the source."""


@dataclass(frozen=True)
class Blocks:
    """The rows of a sweep in order, cut into blocks.

    An item names the rows of its block in `source`, or holds them itself under ``columns`` (then there is no source).
    """

    source: Storage | None
    items: "Sequence[SourceItem] | _SlicedColumns"
    num_rows: int
    ids_sha256: str
    left_out: tuple[str, ...] = ()
    """The places of rows of the source that have no image_id, and are in no block."""
    columns: tuple[str, ...] = ()
    """Columns of the shards that a worker is given beside the images."""

    def num_rows_of(self, block: int) -> int:
        if isinstance(self.items, _SlicedColumns):
            return min(self.items.rows_per_block, self.num_rows - block * self.items.rows_per_block)
        item = self.items[block]
        return len(item["files"] if "files" in item else item["rows"])


class _SlicedColumns(Sequence[ColumnsItem]):
    """Items that are cut from the columns when they are asked for, so that rows are held once."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], num_rows: int, rows_per_block: int) -> None:
        self.columns, self.rows_per_block = columns, rows_per_block
        self.num_blocks = -(-num_rows // rows_per_block)

    def __len__(self) -> int:
        return self.num_blocks

    @overload
    def __getitem__(self, block: int) -> ColumnsItem: ...
    @overload
    def __getitem__(self, block: slice) -> list[ColumnsItem]: ...
    def __getitem__(self, block: int | slice) -> ColumnsItem | list[ColumnsItem]:
        if isinstance(block, slice):
            return [self[each] for each in range(self.num_blocks)[block]]
        block = range(self.num_blocks)[block]
        start = block * self.rows_per_block
        rows = {name: list(values[start : start + self.rows_per_block]) for name, values in self.columns.items()}
        return {"block": block, "columns": rows}


def blocks_of_rows(columns: Mapping[str, Sequence[Any]], rows_per_block: int) -> Blocks:
    """Blocks that hold their rows themselves: equally long sequences of JSON values under each name.

    The digest of the plan is of every value, not only of the ids. Of the sequences slices alone are taken, of a block
    or of `DIGEST_ROWS` rows.
    """
    num_rows = len(next(iter(columns.values())))
    items = _SlicedColumns(columns, num_rows, rows_per_block)
    if len(items) > MAX_BLOCKS:
        raise ValueError(f"{len(items)} blocks of {rows_per_block} rows; at most {MAX_BLOCKS} are listed quickly")
    return Blocks(None, items, num_rows, _sha256_of_json(columns, num_rows))


def _sha256_of_json(columns: Mapping[str, Sequence[Any]], num_rows: int) -> str:
    """The SHA-256 of ``json.dumps(columns)``, which is never there as a whole."""
    digest = hashlib.sha256()
    for index, (name, values) in enumerate(columns.items()):
        digest.update(f"{', ' if index else '{'}{json.dumps(name)}: [".encode())
        for start in range(0, num_rows, DIGEST_ROWS):
            rows = json.dumps(list(values[start : start + DIGEST_ROWS]))
            digest.update(f"{', ' if start else ''}{rows[1:-1]}".encode())
        digest.update(b"]")
    digest.update(b"}")
    return digest.hexdigest()
