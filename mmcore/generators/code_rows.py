"""Captioned images as rows that a model of codes trains on: the codes of a frozen autoencoder, and a prompt.

Everything random of a row is drawn from one generator of its own, keyed by (seed, epoch, image_id): no worker, no
order and no restart changes it.

Shapes: N rows of the dataset, B rows of a batch, h and w sides of a grid of codes, L = h·w codes.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.errors import InputError
from mmcore.generators.fresh_scenes import Draw, FreshScenes
from mmcore.generators.prompt_rows import Prompts
from mmcore.rows import Batch
from mmcore.seeding import generator


def code_dtype(num_codes: int) -> np.dtype:
    """The smallest integers that hold the numbers of so many codes."""
    return np.min_scalar_type(num_codes - 1)


class CodeRows:
    """Rows by index: `codes` int64 (B, L), row by row of the grid, and the prompts.

    In validation every row has its first caption. With `fresh`, training rows are scenes that no epoch before had.
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
        fresh: FreshScenes | None = None,
    ) -> None:
        """`views`: codes (h, w) of the images and, with `flip`, which mirrors half of them, of their mirror; with
        `fresh` those that validate are enough, and no other has to have a caption."""
        if len({view.image_ids for view in views}) != 1:
            raise InputError("the cached views are not of the same images; remove STORAGE/features to make them anew")
        assert len(views) == 1 + flip, "mirrored codes are no codes of a mirror"
        self.views, self.prompts, self.image_ids = [view.values for view in views], prompts, table.image_ids
        self.num_captions = [min(captions_per_image, len(captions)) for captions in table.captions]
        self.drop_text, self.flip, self.seed, self.fresh = drop_text, flip, seed, fresh
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.validation_rows())
        self.num_train, self.num_validation = len(self.train), len(self.validation)
        places = {image_id: place for place, image_id in enumerate(views[0].image_ids)}
        looked_up = [*self.validation.tolist(), *([] if fresh else self.train.tolist())]
        self.places = {row: places[table.image_ids[row]] for row in looked_up}

    def _draw(self, row: int, epoch: int) -> Draw:
        """All draws are made always, so that no setting moves another draw."""
        random = generator(self.seed, "row", epoch, self.image_ids[row])
        mirrored, caption, dropped, exhaustive = torch.rand(4, generator=random, dtype=torch.float64).tolist()
        return Draw(self.flip and mirrored < 0.5, None if dropped < self.drop_text else caption, exhaustive)

    def _batch(self, rows: Sequence[int], mirrored: Sequence[bool], captions: Sequence[int | None]) -> Batch:
        pairs = zip(rows, mirrored, strict=True)
        codes = np.stack([self.views[int(mirror)][self.places[row]] for row, mirror in pairs])
        ids_BL = torch.from_numpy(codes.astype(np.int64)).flatten(1)
        return {"codes": ids_BL, **self.prompts.batch(rows, captions)}

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
