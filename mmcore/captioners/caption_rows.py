"""Training rows of a captioner: images with their captions.

Shapes: B images, C captions per image, T tokens."""

from collections.abc import Iterator

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, VALIDATION, CaptionTable
from mmcore.errors import InputError
from mmcore.rows import Batch
from mmcore.seeding import uniform
from mmcore.text import CaptionTokenizer


class CaptionRows:
    """Rows by index: `images`, `input_ids` int64 (B, C, T) and `lengths` int64 (B, C)."""

    def __init__(
        self,
        table: CaptionTable,
        views: list[Column],
        tokenizer: CaptionTokenizer,
        *,
        captions_per_image: int,
        max_length: int,
        seed: int,
    ) -> None:
        """`views`: the image column, and the mirrored image column if images are mirrored at random."""
        if len({view.image_ids for view in views}) != 1:
            raise InputError("the cached views have different images; remove STORAGE/features and repeat the command")
        places = {image_id: place for place, image_id in enumerate(views[0].image_ids)}
        # -1 for rows that a streamed run does not keep on this machine.
        self.place = np.array([places.get(image_id, -1) for image_id in table.image_ids])
        self.views, self.seed = [view.values for view in views], seed
        self.image_ids = table.image_ids
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.rows(VALIDATION))
        self.num_train, self.num_validation = len(self.train), len(self.validation)
        encoded = [
            [tokenizer.encode(caption, max_length) for caption in captions[:captions_per_image]]
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
        """The images of `rows`. In training (`epoch` given), (seed, epoch, image_id) draws the view."""
        places = self.place[rows]
        assert (places >= 0).all(), "a row is not on this machine"
        if epoch is None or len(self.views) == 1:
            return torch.from_numpy(self.views[0][places])
        view = [uniform(self.seed, "flip", epoch, self.image_ids[row]) < 0.5 for row in rows]
        return torch.from_numpy(np.stack([self.views[int(v)][place] for v, place in zip(view, places, strict=True)]))

    def with_captions(self, images: torch.Tensor, rows: np.ndarray) -> Batch:
        """The batch of `rows`, whose images are `images`."""
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
