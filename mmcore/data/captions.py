"""Captioned images as training rows: what of a prepared dataset a captioner learns from.

Shapes: B images, C captions an image, T words.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch

from mmcore.data.columns import Column
from mmcore.data.shapes import SPLITS, ShapesSettings, make_scene, scene_captions
from mmcore.errors import InputError, not_prepared
from mmcore.seeding import uniform
from mmcore.storage import Storage
from mmcore.text import WordVocabulary
from mmcore.training import Batch

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


def shapes_table(settings: ShapesSettings) -> CaptionTable:
    """The table that the Shapes data of these settings will have; no image is drawn."""
    indices = [(split, index) for split in SPLITS for index in range(settings.num_images(split))]
    ids = [f"shapes-{split}-{index:06d}" for split, index in indices]
    captions = [
        scene_captions(settings.seed, split, index, make_scene(settings.seed, split, index)) for split, index in indices
    ]
    return CaptionTable(ids, [f"{image_id}.png" for image_id in ids], captions, [split for split, _ in indices], {})


class CaptionRows:
    """Rows by index: the image column(s), the token ids of its captions."""

    def __init__(
        self,
        table: CaptionTable,
        views: list[Column],
        vocabulary: WordVocabulary,
        *,
        captions_per_image: int,
        max_length: int,
        seed: int,
    ) -> None:
        """`views`: the image column, and the mirrored one where half of the images are to be mirrored."""
        if len({view.image_ids for view in views}) != 1:
            raise InputError("the cached views are not of the same images; remove STORAGE/features to make them anew")
        places = {image_id: place for place, image_id in enumerate(views[0].image_ids)}
        # -1 where a streamed run keeps no copy of the row.
        self.place = np.array([places.get(image_id, -1) for image_id in table.image_ids])
        self.views, self.seed = [view.values for view in views], seed
        self.image_ids = table.image_ids
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.rows(VALIDATION))
        self.num_train, self.num_validation = len(self.train), len(self.validation)
        encoded = [
            [vocabulary.encode(caption, max_length) for caption in captions[:captions_per_image]]
            for captions in table.captions
        ]
        width = max(len(ids) for captions in encoded for ids in captions)
        self.input_ids = torch.zeros(len(encoded), captions_per_image, width, dtype=torch.long)
        self.lengths = torch.zeros(len(encoded), captions_per_image, dtype=torch.long)
        for row, captions in enumerate(encoded):
            for column, ids in enumerate(captions):
                self.input_ids[row, column, : len(ids)] = torch.tensor(ids)
                self.lengths[row, column] = len(ids)

    def images(self, rows: np.ndarray, epoch: int | None) -> torch.Tensor:
        """The image column of `rows`; in training, the view that (seed, epoch, image_id) draws."""
        places = self.place[rows]
        assert (places >= 0).all(), "a row was looked up that is not on this machine"
        if epoch is None or len(self.views) == 1:
            return torch.from_numpy(self.views[0][places])
        view = [uniform(self.seed, "flip", epoch, self.image_ids[row]) < 0.5 for row in rows]
        return torch.from_numpy(np.stack([self.views[int(v)][place] for v, place in zip(view, places, strict=True)]))

    def with_captions(self, images: torch.Tensor, rows: np.ndarray) -> Batch:
        """A batch of `images`, which are those of `rows`."""
        index = torch.from_numpy(rows)
        return {"images": images, "input_ids": self.input_ids[index], "lengths": self.lengths[index]}

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        rows = self.train[indices]
        return self.with_captions(self.images(rows, epoch), rows)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        rows = self.validation[indices]
        return self.with_captions(self.images(rows, None), rows)

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None
