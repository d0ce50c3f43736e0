"""Parquet files that hold images themselves, as hubs give datasets out: ``data/train-00000-of-00002.parquet``.

The split is that of the file's name or of its folder. huggingface.py reads the rows.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.data.huggingface import IMAGE_COLUMN
from mmcore.data.splits import split_in
from mmcore.errors import InputError

# The name that `datasets` gives a file of a split; an unknown split is said later.
_NUMBERED = re.compile(r"(?P<split>[\w.]+?)-\d+-of-\d+.*")
_ALL = "all"


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files of `folder` with a column of images. Raises InputError for a broken one."""
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    return [path for path in paths if _holds_images(path)]


def _holds_images(path: Path) -> bool:
    try:
        schema = pq.read_schema(path)
    except pa.ArrowException as error:
        raise InputError(f"{path}: broken Parquet: {str(error).splitlines()[0]}") from None
    if IMAGE_COLUMN not in schema.names:
        return False
    kind = schema.field(IMAGE_COLUMN).type
    return pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def files_by_split(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """The source's name of a split, `all` where a file says none, and its files in the order of their names."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        numbered = _NUMBERED.fullmatch(path.name)
        split = split_in(str(path)) or (numbered["split"] if numbered else _ALL)
        found.setdefault(split, []).append(path)
    return found
