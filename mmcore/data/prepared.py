"""Captioned images as training rows: what of a prepared dataset a captioner learns from.

Shapes: B images, C captions an image, T words.
"""

import json
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from mmcore.data.shapes import SPLITS, ShapesSettings, make_scene, scene_captions
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

    def validation_rows(self) -> list[int]:
        """The rows of `validation`, or of `test` in a split without any (Flickr8k's for generators)."""
        return self.rows(VALIDATION) or self.rows(TEST)


def read_dataset_facts(storage: Storage, dataset: str) -> dict:
    """What ``_SUCCESS`` of a prepared dataset says. Raises InputError where it was not prepared."""
    folder = storage / "data" / dataset
    try:
        return json.loads(folder.read("_SUCCESS"))
    except FileNotFoundError:
        raise not_prepared(folder, dataset, storage) from None


def read_captions(storage: Storage, dataset: str, split: str) -> CaptionTable:
    """Read all but the images. Raises InputError for an unprepared dataset or an unknown split column."""
    facts = read_dataset_facts(storage, dataset)
    folder = storage / "data" / dataset
    filesystem, path = folder.arrow()
    schema = pq.read_schema(f"{path}/{folder.list('.parquet')[0]}", filesystem=filesystem)
    columns = [name for name in schema.names if name.startswith("split")]
    if split not in columns:
        raise InputError(f"--split {split!r}: {folder} has {', '.join(columns)}")
    table = pq.read_table(path, filesystem=filesystem, columns=["image_id", "file_name", "captions", split])
    return CaptionTable(
        table["image_id"].to_pylist(),
        table["file_name"].to_pylist(),
        table["captions"].to_pylist(),
        table[split].to_pylist(),
        facts,
    )


def read_prepared(storage_uri: str, dataset: str, columns: list[str]) -> pa.Table:
    """These columns of a prepared dataset, STORAGE/data/{dataset}/*.parquet, rows in the dataset's order.

    Raises:
        InputError: the dataset is not there or was not finished, or has no such column.
    """
    folder = Storage(storage_uri) / "data" / dataset
    names = folder.list(".parquet") if folder.exists("_SUCCESS") else []
    if not names:
        raise not_prepared(folder, dataset, storage_uri)
    tables = []
    for name in names:
        with folder.open(name) as file, pq.ParquetFile(file) as part:
            there = part.schema_arrow.names
            for column in columns:
                if column not in there:
                    raise InputError(f"{folder.uri}: no column {column!r}; columns there: {', '.join(there)}")
            tables.append(part.read(columns=columns))
    return pa.concat_tables(tables)


def shapes_table(settings: ShapesSettings) -> CaptionTable:
    """The table that the Shapes data of these settings will have; no image is drawn."""
    indices = [(split, index) for split in SPLITS for index in range(settings.num_images(split))]
    ids = [f"shapes-{split}-{index:06d}" for split, index in indices]
    captions = [
        scene_captions(settings.seed, split, index, make_scene(settings.seed, split, index)) for split, index in indices
    ]
    return CaptionTable(ids, [f"{image_id}.png" for image_id in ids], captions, [split for split, _ in indices], {})
