"""Training rows of Infinity: the latents of an image, a prompt, the bits to flip, and whether the prompt is dropped.

Flips and drops are drawn from (seed, epoch, image_id). The official code draws the flips once for a batch. An image
would then depend on the others of its batch.

Shapes: B rows of a batch, d bits of a position, L positions of all grids.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mmcore.generators.code_rows import CodeRows
from mmcore.generators.infinity_scales import Grid
from mmcore.rows import Batch
from mmcore.seeding import generator


class InfinityRows:
    """The rows of `CodeRows` with `flips`, bool (B, L, d), and `dropped`, bool (B,). Validation has neither."""

    def __init__(
        self,
        rows: CodeRows,
        *,
        grids: Sequence[Grid],
        num_bits: int,
        flip_strength: float,
        drop_text: float,
        seed: int,
    ) -> None:
        """`rows`: latents with all their captions. `flip_strength`: the largest share of a grid's bits that flip."""
        assert rows.drop_text == 0, "a dropped caption keeps its length here"
        self.rows, self.flip_strength, self.drop_text, self.seed = rows, flip_strength, drop_text, seed
        self.num_bits, self.num_grids = num_bits, len(grids)
        self.grid_L = torch.cat([torch.full((height * width,), number) for number, (height, width) in enumerate(grids)])
        self.num_train, self.num_validation = rows.num_train, rows.num_validation

    def _draw(self, row: int, epoch: int) -> tuple[Tensor, bool]:
        """The flips (L, d) and whether the prompt is dropped. One setting does not change the draws of another."""
        random = generator(self.seed, "bits", epoch, self.rows.image_ids[row])
        dropped, *strengths = torch.rand(1 + self.num_grids, generator=random, dtype=torch.float64).tolist()
        strength_L = self.flip_strength * torch.tensor(strengths)[self.grid_L]
        flips_Ld = torch.rand(len(self.grid_L), self.num_bits, generator=random) < strength_L[:, None]
        return flips_Ld, dropped < self.drop_text

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        draws = [self._draw(row, epoch) for row in self.rows.train[indices].tolist()]
        flips, dropped = zip(*draws, strict=True)
        return {
            **self.rows.train_batch(indices, epoch),
            "flips": torch.stack(flips),
            "dropped": torch.tensor(dropped),
        }

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return self.rows.validation_batch(indices)

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None
