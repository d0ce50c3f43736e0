"""What jobs/prepare.py left under STORAGE/data/DATASET: its facts, its columns, and its captions as training rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.data.shapes import SPLITS, ShapesSettings, make_scene
from mmcore.data.shapes_captions import scene_captions
from mmcore.errors import InputError, not_prepared
from mmcore.storage import Storage

TRAIN, VALIDATION, TEST = "train", "validation", "test"


@dataclass(frozen=True)
class CaptionTable:
    """Ids, captions and one split column of a prepared dataset, in its order."""

    image_ids: list[str]
    file_names: list[str]
    captions: list[list[str]]
    splits: list[str]
    facts: dict

    def rows(self, split: str) -> list[int]:
        return [row for row, name in enumerate(self.splits) if name == split]

    @property
    def validation_split(self) -> str:
        """`validation`, or `test` in a split without any such row (Flickr8k's for generators)."""
        return VALIDATION if VALIDATION in self.splits else TEST

    def validation_rows(self) -> list[int]:
        """The rows of `validation_split`."""
        return self.rows(self.validation_split)


class DatasetSummary:
    """Counts and fingerprint of the rows of a prepared dataset, which are added in order."""

    def __init__(self, split_columns: Sequence[str]) -> None:
        self.num_images = self.num_captions = 0
        self._splits: dict[str, Counter[str]] = {column: Counter() for column in split_columns}
        self._sha256 = hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        self.num_images += 1
        self.num_captions += len(row["captions"])
        for column, counts in self._splits.items():
            counts[row[column]] += 1
        text = json.dumps([row["image_id"], row["captions"]], ensure_ascii=False).encode()
        for data in (text, row["image"]):
            # The length first, so that no two datasets spell the same bytes.
            self._sha256.update(len(data).to_bytes(8, "little") + data)

    def facts(self) -> dict[str, Any]:
        """num_images, num_captions, splits ({column: {value: count}}) and fingerprint, as ``_SUCCESS`` has them."""
        return {
            "num_images": self.num_images,
            "num_captions": self.num_captions,
            "splits": {column: dict(counts) for column, counts in self._splits.items()},
            "fingerprint": self._sha256.hexdigest(),
        }


def read_dataset_facts(storage: Storage, dataset: str) -> dict:
    """What ``_SUCCESS`` of a prepared dataset says. Raises InputError where it was not prepared."""
    folder = storage / "data" / dataset
    try:
        return json.loads(folder.read("_SUCCESS"))
    except FileNotFoundError:
        raise not_prepared(folder, dataset, storage) from None


def read_prepared(storage_uri: str, dataset: str, columns: list[str]) -> pa.Table:
    """These columns of a prepared dataset, STORAGE/data/{dataset}/*.parquet, rows in the dataset's order.

    Raises:
        InputError: the dataset is not there or was not finished, or has no such column.
    """
    storage = Storage(storage_uri)
    read_dataset_facts(storage, dataset)
    folder = storage / "data" / dataset
    tables = []
    for name in folder.list(".parquet"):
        with folder.open(name) as file, pq.ParquetFile(file) as part:
            there = part.schema_arrow.names
            for column in columns:
                if column not in there:
                    raise InputError(f"{folder.uri}: no column {column!r}; columns there: {', '.join(there)}")
            tables.append(part.read(columns=columns))
    if not tables:
        raise not_prepared(folder, dataset, storage_uri)
    return pa.concat_tables(tables)


def read_captions(storage: Storage, dataset: str, split: str) -> CaptionTable:
    """Read all but the images.

    Raises InputError for an unprepared dataset, an unknown split column, and one without rows that train or validate.
    """
    facts = read_dataset_facts(storage, dataset)
    folder = storage / "data" / dataset
    names = folder.list(".parquet")
    columns: list[str] = []
    if names:
        with folder.open(names[0]) as file, pq.ParquetFile(file) as part:
            columns = [name for name in part.schema_arrow.names if name.startswith("split")]
        if split not in columns:
            raise InputError(f"--split {split!r}: {folder} has no such column; give --split {' or '.join(columns)}")
    table = read_prepared(storage.uri, dataset, ["image_id", "file_name", "captions", split])
    captions = CaptionTable(
        table["image_id"].to_pylist(),
        table["file_name"].to_pylist(),
        table["captions"].to_pylist(),
        table[split].to_pylist(),
        facts,
    )
    if TRAIN not in captions.splits or captions.validation_split not in captions.splits:
        there = ", ".join(f"{name} {number:,}" for name, number in Counter(captions.splits).most_common())
        others = " or ".join(name for name in columns if name != split)
        raise InputError(
            f"--split {split}: {folder} has {there}; training needs images that are {TRAIN}, and others that are "
            f"{VALIDATION} or {TEST}{f'; try --split {others}' if others else ''}"
        )
    return captions


def split_image_ids(storage_uri: str, dataset: str, column: str, name: str) -> list[str]:
    """The image_ids of the rows whose `column` is `name`, in the dataset's order. Raises InputError where none is."""
    table = read_prepared(storage_uri, dataset, ["image_id", column])
    values = table[column].to_pylist()
    chosen = [image_id for image_id, value in zip(table["image_id"].to_pylist(), values, strict=True) if value == name]
    if not chosen:
        there = ", ".join(repr(value) for value in sorted(set(map(str, values))))
        raise InputError(f"{dataset}: no image has {column} {name!r}; values there: {there}")
    return chosen


def read_split(split: str, storage_uri: str, dataset: str) -> tuple[str, str, list[str]]:
    """COLUMN:NAME -> column, name and the image_ids there. Raises InputError where no image is."""
    column, colon, name = split.partition(":")
    if not (column and colon and name):
        raise InputError(f"--split {split}: expected COLUMN:NAME, such as split_report:validation")
    return column, name, split_image_ids(storage_uri, dataset, column, name)


def prepared_images(storage_uri: str, dataset: str) -> Iterator[tuple[str, bytes]]:
    """image_id and encoded image of every row in order; one file at a time, as all of them would fill the memory."""
    folder = Storage(storage_uri) / "data" / dataset
    for name in folder.list(".parquet"):
        with folder.open(name) as file:
            part = pq.read_table(file, columns=["image_id", "image"])
        yield from zip(part["image_id"].to_pylist(), part["image"].to_pylist(), strict=True)


def shapes_table(settings: ShapesSettings) -> CaptionTable:
    """The table that the Shapes data of these settings will have; no image is drawn."""
    indices = [(split, index) for split in SPLITS for index in range(settings.num_images(split))]
    ids = [f"shapes-{split}-{index:06d}" for split, index in indices]
    captions = [
        scene_captions(settings.seed, split, index, make_scene(settings.seed, split, index, settings.max_objects))
        for split, index in indices
    ]
    return CaptionTable(ids, [f"{image_id}.png" for image_id in ids], captions, [split for split, _ in indices], {})
