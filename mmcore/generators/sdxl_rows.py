"""Training rows of an SDXL LoRA: cached moments of latents, cached text embeddings, a timestep and noise.

Each row has a random generator with the key (seed, epoch, image_id). Its random choices do not depend on the worker,
the order of rows, or restarts.

Shapes: B images, h and w sides of the latents, T text tokens, C channels of a text token, P channels of the pooled
text.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.errors import InputError
from mmcore.rows import Batch
from mmcore.seeding import generator

MOMENTS, SIZES = "moments", "sizes"
"""Tensors of an image: mean and logarithm of variance of the VAE, (8, h, w), and height, width, top, left."""
EMBEDS, POOLED = "prompt_embeds", "pooled"
"""Tensors of an image's captions: (K, T, C) and (K, P)."""


class SdxlRows:
    """Rows by index, as `SdxlLora.forward` takes them.

    Validation uses the first caption of each row, and the same timestep and noise every time.
    """

    def __init__(
        self,
        table: CaptionTable,
        views: Sequence[Column],
        text: Column,
        *,
        captions_per_image: int,
        image_size: int,
        num_timesteps: int,
        seed: int,
    ) -> None:
        """`views`: columns of the images and, to mirror them at random, of the mirrored images. `text`: the column of
        their captions. Raises InputError if they hold different images."""
        if len({each.image_ids for each in (*views, text)}) != 1:
            raise InputError("the cached columns have different images; remove STORAGE/features and repeat the command")
        places = {image_id: place for place, image_id in enumerate(text.image_ids)}
        self.places = [places[image_id] for image_id in table.image_ids]
        self.views, self.text, self.image_ids = [view.tensors for view in views], text.tensors, table.image_ids
        self.num_captions = [min(captions_per_image, len(captions)) for captions in table.captions]
        self.image_size, self.num_timesteps, self.seed = image_size, num_timesteps, seed
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.validation_rows())
        self.num_train, self.num_validation = len(self.train), len(self.validation)

    def _row(self, row: int, epoch: int | None) -> Batch:
        """One row of a batch. All numbers are always drawn, so that one setting does not change those of another."""
        random = generator(self.seed, "row", "validation" if epoch is None else epoch, self.image_ids[row])
        mirrored, caption = torch.rand(2, generator=random, dtype=torch.float64).tolist()
        timestep = torch.randint(self.num_timesteps, (), generator=random)
        is_plain = epoch is None
        view = self.views[0 if is_plain or len(self.views) == 1 or mirrored >= 0.5 else 1]
        place = self.places[row]
        moments = torch.from_numpy(np.asarray(view[MOMENTS][place])).float()
        shape = (moments.shape[0] // 2, *moments.shape[1:])
        chosen = 0 if is_plain else int(caption * self.num_captions[row])
        return {
            "moments": moments,
            "noise": torch.randn(shape, generator=random),
            "latent_noise": torch.randn(shape, generator=random),
            "channel_noise": torch.randn((shape[0], 1, 1), generator=random),
            "timesteps": timestep,
            "time_ids": torch.tensor([*np.asarray(view[SIZES][place]).tolist(), *[self.image_size] * 2]).float(),
            EMBEDS: torch.from_numpy(np.asarray(self.text[EMBEDS][place][chosen])).float(),
            POOLED: torch.from_numpy(np.asarray(self.text[POOLED][place][chosen])).float(),
        }

    def _batch(self, rows: Sequence[int], epoch: int | None) -> Batch:
        made = [self._row(row, epoch) for row in rows]
        return {name: torch.stack([each[name] for each in made]) for name in made[0]}

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        return self._batch(self.train[indices].tolist(), epoch)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(self.validation[indices].tolist(), None)

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None
