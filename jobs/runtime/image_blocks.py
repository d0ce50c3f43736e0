"""Blocks over images that lie somewhere: Parquet shards, or a folder of image files."""

import hashlib
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.runtime.blocks import MAX_BLOCKS, ROWS_PER_BLOCK, Blocks
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES
from mmcore.storage import Storage


def plan_blocks(source: Storage, split: str | None = None, rows_per_block: int = ROWS_PER_BLOCK) -> Blocks:
    """Blocks over Parquet shards (``image_id``, ``image``) or over a folder of image files.

    `split`: ``COLUMN:NAME`` keeps the rows of one split. Raises InputError for an empty source, a missing column, a
    split that no row is of, or an image_id that stands there twice.
    """
    shards = source.list(".parquet")
    if shards:
        items, ids = _parquet_blocks(source, shards, split, rows_per_block)
    else:
        if split is not None:
            raise InputError(f"--split {split}: {source} holds no Parquet shards with a split column")
        files = [name for name in source.list() if name.lower().endswith(IMAGE_SUFFIXES)]
        ids = [os.path.splitext(name)[0] for name in files]
        step = max(rows_per_block, -(-len(files) // MAX_BLOCKS))
        items = [{"files": files[i : i + step]} for i in range(0, len(files), step)]
    if not ids and shards:
        raise InputError(f"{source}: its Parquet shards hold no rows")
    if not ids:
        raise InputError(f"{source}: neither Parquet shards nor image files ({' '.join(IMAGE_SUFFIXES)}) there")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(image_id for image_id in ids if image_id in seen or seen.add(image_id))  # type: ignore[func-returns-value]
        raise InputError(f"{source}: image_id {twice!r} stands there twice; each image must have its own")
    digest = hashlib.sha256("\n".join(ids).encode()).hexdigest()
    return Blocks(source, [{"block": k, **item} for k, item in enumerate(items)], len(ids), digest)


def _parquet_blocks(
    source: Storage, shards: list[str], split: str | None, rows_per_block: int
) -> tuple[list[dict[str, Any]], list[str]]:
    column, _, name = (split or "").partition(":")
    if split is not None and not name:
        raise InputError(f"--split {split!r}: write COLUMN:NAME, such as split_karpathy:test")
    files = [pq.ParquetFile(source.open(shard)) for shard in shards]
    rows_per_block = max(rows_per_block, -(-sum(file.metadata.num_rows for file in files) // MAX_BLOCKS))
    items: list[dict[str, Any]] = []
    ids: list[str] = []
    there: set[str] = set()
    for shard, file in zip(shards, files, strict=True):
        names = file.schema_arrow.names
        for needed in ["image_id", "image", *([column] if split else [])]:
            if needed not in names:
                raise InputError(f"{source}/{shard}: no column {needed!r}; it has {', '.join(names)}")
        for group in range(file.metadata.num_row_groups):
            table = file.read_row_group(group, columns=["image_id", *([column] if split else [])])
            values = table[column].to_pylist() if split else [name] * len(table)
            there.update(values)
            rows = [row for row, value in enumerate(values) if value == name]
            chosen = table["image_id"].take(pa.array(rows, pa.int64())).to_pylist()
            ids += chosen
            items += [
                {"shard": shard, "row_group": group, "rows": rows[i : i + rows_per_block]}
                for i in range(0, len(rows), rows_per_block)
            ]
    if split and there and not ids:
        raise InputError(f"--split {split}: no row of {source} is of it; the column holds {', '.join(sorted(there))}")
    return items, ids


def read_block(source: Storage, item: dict[str, Any]) -> dict[str, Any]:
    """The rows of one block: lists under ``image_id``, ``file_name`` and ``image`` (encoded bytes)."""
    if "files" in item:
        return {
            "image_id": [os.path.splitext(name)[0] for name in item["files"]],
            "file_name": list(item["files"]),
            "image": [source.read(name) for name in item["files"]],
        }
    with source.open(item["shard"]) as opened, pq.ParquetFile(opened) as file:
        names = [name for name in ("image_id", "file_name", "image") if name in file.schema_arrow.names]
        table = file.read_row_group(item["row_group"], columns=names)
    rows = table.take(pa.array(item["rows"], pa.int64())).to_pydict()
    return {**rows, "file_name": rows.get("file_name", rows["image_id"])}
