"""The rows of a sweep in order, cut into blocks that are worked on and committed one by one."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from mmcore.storage import Storage

# More files than this make listing and reading a finished sweep slow.
MAX_BLOCKS = 10_000
ROWS_PER_BLOCK = 64


@dataclass(frozen=True)
class Blocks:
    """The rows of a sweep in order, cut into blocks.

    An item names the rows of its block in `source`, or holds them itself under ``columns`` (then there is no source).
    """

    source: Storage | None
    items: list[dict[str, Any]]
    num_rows: int
    ids_sha256: str


def blocks_of_rows(columns: dict[str, list[Any]], rows_per_block: int) -> Blocks:
    """Blocks that hold their rows themselves: equally long lists of JSON values under each name.

    The digest of the plan is of every value, not only of the ids.
    """
    num_rows = len(next(iter(columns.values())))
    items = [
        {"block": k, "columns": {name: values[start : start + rows_per_block] for name, values in columns.items()}}
        for k, start in enumerate(range(0, num_rows, rows_per_block))
    ]
    if len(items) > MAX_BLOCKS:
        raise ValueError(f"{len(items)} blocks of {rows_per_block} rows; at most {MAX_BLOCKS} are listed quickly")
    return Blocks(None, items, num_rows, hashlib.sha256(json.dumps(columns).encode()).hexdigest())
