"""Blocks over images that lie somewhere: Parquet shards, or a folder of image files.

Shards directly in the folder are read, else the image files in it and in the folders below, else the shards below. What
of them is left out is said. A hidden file is no image.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TypedDict, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as types

from jobs.runtime.blocks import MAX_BLOCKS, ROWS_PER_BLOCK, Blocks, FilesItem, ImageFiles, ShardRows, SourceItem
from jobs.runtime.commandline import counted
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES
from mmcore.storage import Storage

_SHARD = ".parquet"
# What code before 2026-11-28 took for images, directly in the folder.
_EARLIER_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageRows(TypedDict):
    """The rows of a block of images (encoded bytes, or None for a null), and its files that are no longer there."""

    image_id: list[str]
    file_name: list[str]
    image: list[bytes | None]
    gone: list[str]


def plan_blocks(
    source: Storage,
    split: str | None = None,
    rows_per_block: int = ROWS_PER_BLOCK,
    *,
    began_with: Sequence[str] | None = None,
    began_sha256: str | None = None,
    skip_bad: bool = False,
) -> Blocks:
    """Blocks over Parquet shards (``image_id``, ``image``) or over image files.

    An image file's image_id is its path in `source` without the ending: ``dog/1`` of ``dog/1.jpg``.

    Args:
        split: ``COLUMN:NAME`` keeps the rows of one split.
        began_with: the image files of an earlier plan, which stays as it was; files that are gone are marked in it.
        began_sha256: of the ids of an earlier plan that does not list its files. Where only the files that code of then
            took for images give it, the plan is over them.
        skip_bad: leave out rows without an image_id, which are an error otherwise.

    Raises InputError for an empty source, a column that is missing or has another type, and a split without rows. Also
    for a duplicate image_id, and for a file that is not in `began_with`.
    """
    names = source.walk()
    files = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    shards = [name for name in names if name.endswith(_SHARD) and "/" not in name]
    if not shards and not files:
        shards = [name for name in names if name.endswith(_SHARD)]
    if not shards and not files:
        raise InputError(f"{source}: neither Parquet shards nor image files ({' '.join(IMAGE_SUFFIXES)}) there")
    _say_what_is_left_out(source, names, shards, files)
    if not shards and began_with is None and began_sha256 not in (None, _sha256(_image_ids(files))):
        earlier = [name for name in files if "/" not in name and name.lower().endswith(_EARLIER_SUFFIXES)]
        if _sha256(_image_ids(earlier)) == began_sha256:
            others = sorted({*files}.difference(earlier))
            print(
                f"left out of {source}: {len(others):,} image files, {others[0]} the first, which the sweep began "
                "without; give another --out for them",
                flush=True,
            )
            files = earlier
    items: Sequence[ImageFiles | ShardRows]
    left_out: list[str] = []
    if shards:
        items, ids, left_out = _parquet_blocks(source, shards, split, rows_per_block)
        if left_out and not skip_bad:
            raise InputError(f"{source}/{left_out[0]} has no image_id; give it one, or leave it out with --skip-bad")
    elif split is not None:
        raise InputError(f"--split {split}: {source} holds no Parquet shards with a split column")
    else:
        items, ids = _file_blocks(source, files, began_with, rows_per_block)
    if not ids:
        raise InputError(f"{source}: its Parquet shards hold no rows{' with an image_id' if left_out else ''}")
    if len(set(ids)) != len(ids):
        seen: set[str] = set()
        twice = next(image_id for image_id in ids if image_id in seen or seen.add(image_id))  # type: ignore[func-returns-value]
        both = ", ".join(name for name in files if os.path.splitext(name)[0] == twice)
        where = f" ({both})" if not shards else ""
        raise InputError(f"{source}: image_id {twice!r} stands there twice{where}; each image must have its own")
    return Blocks(
        source,
        cast(list[SourceItem], [{"block": k, **item} for k, item in enumerate(items)]),
        len(ids),
        _sha256(ids),
        tuple(left_out),
    )


def _image_ids(files: Sequence[str]) -> list[str]:
    return [os.path.splitext(name)[0] for name in files]


def _sha256(ids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def image_files(blocks: Blocks) -> list[str] | None:
    """The image files of a plan in order, which `plan_blocks` takes as `began_with`; None where it is over shards."""
    if "files" not in blocks.items[0]:
        return None
    return [name for item in cast(Sequence[FilesItem], blocks.items) for name in item["files"]]


def _say_what_is_left_out(source: Storage, names: list[str], shards: list[str], files: list[str]) -> None:
    """Of the images, where shards are read, and of all files otherwise."""
    taken = {*shards} if shards else {*files}
    others = [name for name in names if name not in taken]
    if shards:
        others = [name for name in others if name.endswith((_SHARD, *IMAGE_SUFFIXES)) or name in files]
    if others:
        endings = Counter(PurePosixPath(name).suffix.lower() or "none" for name in others)
        counts = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common())
        why = "beside the Parquet shards" if shards else "no images by their endings"
        print(f"left out of {source}: {counted(len(others), 'file')}, {why} ({counts})", flush=True)


def _file_blocks(
    source: Storage, files: list[str], began_with: Sequence[str] | None, rows_per_block: int
) -> tuple[list[ImageFiles], list[str]]:
    gone: set[str] = set()
    if began_with is not None:
        if new := sorted({*files}.difference(began_with)):
            raise InputError(
                f"{source}: {len(new):,} image files, {new[0]} the first, were not there when the sweep began; give "
                "another --out, or move them elsewhere"
            )
        gone, files = {*began_with}.difference(files), list(began_with)
    ids = _image_ids(files)
    step = max(rows_per_block, -(-len(files) // MAX_BLOCKS))
    items: list[ImageFiles] = []
    for start in range(0, len(files), step):
        block = files[start : start + step]
        items.append({"files": block, "gone": [name for name in block if name in gone]})
    return items, ids


def _parquet_blocks(
    source: Storage, shards: list[str], split: str | None, rows_per_block: int
) -> tuple[list[ShardRows], list[str], list[str]]:
    """The blocks, the image_ids of their rows, and the places of the rows that have none."""
    column, _, name = (split or "").partition(":")
    if split is not None and not name:
        raise InputError(f"--split {split!r}: write COLUMN:NAME, such as split_karpathy:test")
    groups: list[tuple[str, int, list[int]]] = []
    ids: list[str] = []
    left_out: list[str] = []
    there: set[str] = set()
    num_rows = 0
    for shard in shards:
        with _opened(source, shard) as file:
            _check_columns(f"{source}/{shard}", file.schema_arrow, ["image_id", "image", *([column] if split else [])])
            num_rows += file.metadata.num_rows
            for group in range(file.metadata.num_row_groups):
                table = file.read_row_group(group, columns=["image_id", *([column] if split else [])])
                values = [str(value) for value in table[column].to_pylist()] if split else [name] * len(table)
                there.update(values)
                image_ids = table["image_id"].to_pylist()
                chosen = [row for row, value in enumerate(values) if value == name]
                rows = [row for row in chosen if image_ids[row] is not None]
                left_out += [f"{shard}: row {row} of row group {group}" for row in chosen if image_ids[row] is None]
                ids += [str(image_ids[row]) for row in rows]
                groups.append((shard, group, rows))
    if split and there and not ids and not left_out:
        raise InputError(f"--split {split}: no row of {source} is of it; the column holds {', '.join(sorted(there))}")
    step = max(rows_per_block, -(-num_rows // MAX_BLOCKS))
    items: list[ShardRows] = [
        {"shard": shard, "row_group": group, "rows": rows[i : i + step]}
        for shard, group, rows in groups
        for i in range(0, len(rows), step)
    ]
    return items, ids, left_out


@contextmanager
def _opened(source: Storage, shard: str) -> Iterator[pq.ParquetFile]:
    try:
        with source.open(shard) as opened, pq.ParquetFile(opened) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        # Arrow has OSError for broken pages, without a number.
        if getattr(error, "errno", None) is not None:
            raise
        raise InputError(f"{source}/{shard}: broken Parquet: {str(error).splitlines()[0]}") from None


def _check_columns(place: str, schema: pa.Schema, needed: Sequence[str]) -> None:
    for name in needed:
        if name not in schema.names:
            raise InputError(f"{place}: no column {name!r}; it has {', '.join(schema.names)}")
    image_id, image = (_plain(schema.field(name).type) for name in ("image_id", "image"))
    if not _is_text(image_id) and not types.is_integer(image_id):
        raise InputError(f"{place}: column 'image_id' is of type {image_id}; make it text or whole numbers")
    if types.is_struct(image) and image.get_field_index("bytes") >= 0:
        image = _plain(image.field("bytes").type)
    if not (types.is_binary(image) or types.is_large_binary(image) or types.is_binary_view(image)):
        raise InputError(
            f"{place}: column 'image' is of type {image}; make it binary, the bytes of a JPEG or PNG, or a struct with "
            "such a field 'bytes'"
        )


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def read_block(source: Storage, item: SourceItem, columns: Sequence[str] = ()) -> ImageRows:
    """The rows of one block: lists under ``image_id``, ``file_name`` and ``image`` (encoded bytes, or None for a null).

    Of shards, also under the names of `columns`, as they are there.
    ``gone`` lists the files of the block that are no longer there; their image is None.
    """
    if "files" in item:
        try:
            images = [None if name in item["gone"] else source.read(name) for name in item["files"]]
        except FileNotFoundError as error:
            raise InputError(f"{error.filename or error}: went away meanwhile; give the same command again") from None
        ids = _image_ids(item["files"])
        return {"image_id": ids, "file_name": list(item["files"]), "image": images, "gone": item["gone"]}
    with _opened(source, item["shard"]) as file:
        schema = file.schema_arrow
        names = ["image_id", "image", *columns]
        if "file_name" in schema.names and _is_text(_plain(schema.field("file_name").type)):
            names.append("file_name")
        table = file.read_row_group(item["row_group"], columns=names)
    # A slice, as Arrow takes rows of some types only.
    first, last = item["rows"][0], item["rows"][-1]
    part = table.slice(first, last - first + 1).to_pydict()
    rows = {name: [values[row - first] for row in item["rows"]] for name, values in part.items()}
    ids = [str(image_id) for image_id in rows["image_id"]]
    read: ImageRows = {
        "image_id": ids,
        "file_name": [name or image_id for name, image_id in zip(rows.get("file_name", ids), ids, strict=True)],
        # Hugging Face writes a struct of bytes and path.
        "image": [image["bytes"] if isinstance(image, dict) else image for image in rows["image"]],
        "gone": [],
    }
    return cast(ImageRows, {**read, **{name: rows[name] for name in columns}})
