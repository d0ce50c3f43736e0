"""Training rows of models that match images with texts: an image and one of its captions.

Shapes: B images, T tokens, L image tokens, E channels of an image token, P pixels a side.
"""

from typing import Any

import numpy as np
import torch

from mmcore.captioners.caption_rows import CaptionRows
from mmcore.errors import InputError
from mmcore.rows import Batch
from mmcore.seeding import uniform


class MatchingRows(CaptionRows):
    """Rows by index, with one caption an image.

    A batch has:

    * `images`: cached tokens (B, L, E), or uint8 pixels (B, P, P, 3).
    * `input_ids` int64 (B, 1, T) and `lengths` int64 (B, 1): a caption.
    * `uniforms` float64 (B, 2), in [0, 1): they choose the hard negatives (`qformer_losses.itm_negatives`).
    * `image_index` int64 (B,): number of the image in the dataset, to recognise equal images.
    * `num_train` int64 (B,): training rows of an epoch.

    In training (seed, epoch, image_id) draws the view, the caption and the uniform numbers. Validation takes the first
    view and the first caption, and draws equal uniform numbers each time.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Arguments of `CaptionRows`; `captions_per_image` is how many captions are drawn from, the first ones.

        Raises InputError for an image without a caption.
        """
        super().__init__(*arguments, **keywords)
        self.num_captions = (self.lengths > 0).sum(dim=1)
        used = np.concatenate([self.train, self.validation]).astype(np.int64)
        without = used[self.num_captions.numpy()[used] == 0]
        if len(without):
            raise InputError(
                f"image {self.image_ids[without[0]]!r} and {len(without) - 1} others have no caption to match; "
                "prepare the dataset again without them"
            )

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        return self._batch(self.train[indices], epoch)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(self.validation[indices], None)

    def _batch(self, rows: np.ndarray, epoch: int | None) -> Batch:
        batch = self.with_captions(self.images(rows, epoch), rows)
        each = torch.arange(len(rows))
        chosen = torch.tensor([self._caption(int(row), epoch) for row in rows])
        when = "validation" if epoch is None else epoch
        uniforms = [
            [uniform(self.seed, kind, when, self.image_ids[row]) for kind in ("negative_text", "negative_image")]
            for row in rows
        ]
        return {
            "images": batch["images"],
            "input_ids": batch["input_ids"][each, chosen, None],
            "lengths": batch["lengths"][each, chosen, None],
            "uniforms": torch.tensor(uniforms, dtype=torch.float64),
            "image_index": torch.from_numpy(rows),
            "num_train": torch.full((len(rows),), self.num_train),
        }

    def _caption(self, row: int, epoch: int | None) -> int:
        if epoch is None:
            return 0
        return int(uniform(self.seed, "caption", epoch, self.image_ids[row]) * int(self.num_captions[row]))
