"""Training rows of a generator over what a frozen autoencoder makes of an image: codes, or latents; and a prompt.

Each row has a random generator with the key (seed, epoch, image_id). Its random choices do not depend on the worker,
the order of rows, or restarts.

Shapes: N rows of the dataset, B rows of a batch, h and w sides of a grid of codes, L = h·w codes, C channels of
latents.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.errors import InputError
from mmcore.generators.fresh_scenes import Draw, FreshScenes, Output
from mmcore.generators.prompt_rows import Prompts
from mmcore.rows import Batch
from mmcore.seeding import generator


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest integer type for the indices of `num_codes` codes."""
    return np.min_scalar_type(num_codes - 1)


class CodeRows:
    """Rows by index: `codes` int64 (B, L), row by row of the grid, or `latents` fp32 (B, C, h, w), and the prompts.

    Validation uses the first caption of each row. With `fresh`, every epoch trains on new scenes.
    """

    def __init__(
        self,
        table: CaptionTable,
        views: Sequence[Column],
        prompts: Prompts,
        *,
        captions_per_image: int,
        drop_text: float,
        flip: bool,
        seed: int,
        output: Output = "codes",
        fresh: FreshScenes | None = None,
    ) -> None:
        """`views`: codes (h, w) or latents (C, h, w) of the images and, with `flip`, of the mirrored images.

        With `fresh`, only validation rows need them, and captions.
        """
        if len({view.image_ids for view in views}) != 1:
            raise InputError("the cached views have different images; remove STORAGE/features and repeat the command")
        assert len(views) == 1 + flip, "flip needs the mirrored images too"
        assert fresh is None or fresh.output == output, "fresh scenes have the same outputs"
        self.views, self.prompts, self.image_ids = [view.values for view in views], prompts, table.image_ids
        self.num_captions = [min(captions_per_image, len(captions)) for captions in table.captions]
        self.drop_text, self.flip, self.seed, self.output, self.fresh = drop_text, flip, seed, output, fresh
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.validation_rows())
        self.num_train, self.num_validation = len(self.train), len(self.validation)
        places = {image_id: place for place, image_id in enumerate(views[0].image_ids)}
        looked_up = [*self.validation.tolist(), *([] if fresh else self.train.tolist())]
        self.places = {row: places[table.image_ids[row]] for row in looked_up}

    def _draw(self, row: int, epoch: int) -> Draw:
        """Always draws all numbers, so that one setting does not change the draws of another."""
        random = generator(self.seed, "row", epoch, self.image_ids[row])
        mirrored, caption, dropped, exhaustive = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        return Draw(self.flip and mirrored < 0.5, None if dropped < self.drop_text else caption, exhaustive)

    def _batch(self, rows: Sequence[int], mirrored: Sequence[bool], captions: Sequence[int | None]) -> Batch:
        pairs = zip(rows, mirrored, strict=True)
        values = np.stack([self.views[int(mirror)][self.places[row]] for row, mirror in pairs])
        if self.output == "codes":
            made = torch.from_numpy(values.astype(np.int64)).flatten(1)
        else:
            made = torch.from_numpy(values.astype(np.float32))
        return {self.output: made, **self.prompts.batch(rows, captions)}

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        rows = self.train[indices].tolist()
        draws = [self._draw(row, epoch) for row in rows]
        if self.fresh is not None:
            return self.fresh.batch([epoch * self.num_train + index for index in indices.tolist()], draws)
        captions = [
            None if draw.caption is None else int(draw.caption * self.num_captions[row])
            for row, draw in zip(rows, draws, strict=True)
        ]
        return self._batch(rows, [draw.mirrored for draw in draws], captions)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        rows = self.validation[indices].tolist()
        return self._batch(rows, [False] * len(rows), [0] * len(rows))

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None
