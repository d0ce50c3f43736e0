"""Images alone as training rows, and the two forms of an image: uint8 pixels and what networks take.

Shapes: B images, P pixels a side.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.rows import Batch
from mmcore.seeding import uniform


def to_network(pixels_BPP3: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels (B, P, P, 3) -> (B, 3, P, P) in [-1, 1], channels last in memory."""
    return pixels_BPP3.permute(0, 3, 1, 2).to(dtype).div(127.5).sub(1)


def to_pixels(x_B3PP: Tensor) -> Tensor:
    """(B, 3, P, P) in [-1, 1] -> the nearest uint8 pixels (B, P, P, 3); what lies outside is clipped."""
    return x_B3PP.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class PixelRows:
    """Rows by index: ``images``, uint8 (B, P, P, 3), mirrored half of the time as (seed, epoch, image_id) draws."""

    def __init__(self, table: CaptionTable, column: Column, *, flip: bool, seed: int) -> None:
        places = {image_id: place for place, image_id in enumerate(column.image_ids)}
        self.place = np.array([places[image_id] for image_id in table.image_ids])
        self.values, self.flip, self.seed, self.image_ids = column.values, flip, seed, table.image_ids
        self.train = np.array(table.rows(TRAIN))
        self.validation = np.array(table.validation_rows())
        self.num_train, self.num_validation = len(self.train), len(self.validation)

    def pixels(self, rows: np.ndarray, epoch: int | None) -> np.ndarray:
        """uint8 (B, P, P, 3); as they are where `epoch` is None."""
        pixels = self.values[self.place[rows]]
        if epoch is None or not self.flip:
            return pixels
        mirrored = [uniform(self.seed, "flip", epoch, self.image_ids[row]) < 0.5 for row in rows]
        return np.where(np.array(mirrored)[:, None, None, None], pixels[:, :, ::-1], pixels)

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        return {"images": torch.from_numpy(self.pixels(self.train[indices], epoch))}

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return {"images": torch.from_numpy(self.pixels(self.validation[indices], None))}

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None
