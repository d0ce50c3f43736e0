"""Training rows of a diffusion: pixels or latents, a prompt, a timestep and noise.

Each row has a random generator with the key (seed, epoch, image_id). Its random choices do not depend on the worker,
the order of rows, or restarts.

Shapes: N rows of the dataset, B rows of a batch, C channels, H rows and W columns of a sample.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.data.pixels import to_network
from mmcore.data.prepared import TRAIN, CaptionTable
from mmcore.errors import InputError
from mmcore.generators.diffusion import NoiseSchedule
from mmcore.generators.prompt_rows import Prompts
from mmcore.rows import Batch
from mmcore.seeding import generator


@dataclass(frozen=True)
class _Draw:
    """The random choices for one row in one epoch."""

    mirrored: bool
    caption: int | None
    timestep: int
    noise: torch.Tensor


class GenerationRows:
    """Rows by index: `x_0`, `noise` (B, C, H, W), `timesteps` (B,) and the prompts.

    Validation uses the first caption of each row, and the same timestep and noise every time.
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
        noise: NoiseSchedule,
        scaling_factor: float,
        seed: int,
    ) -> None:
        """`views`: pixels uint8 (H, W, 3), or latents (C, H, W) and with `flip` the latents of the mirrored images.

        `flip` mirrors images with probability 1/2. Latents are multiplied by `scaling_factor`.
        """
        if len({view.image_ids for view in views}) != 1:
            raise InputError("the cached views have different images; remove STORAGE/features and repeat the command")
        self.are_pixels = views[0].values.dtype == np.uint8
        assert len(views) == (2 if flip and not self.are_pixels else 1), "flip needs the latents of mirrored images"
        places = {image_id: place for place, image_id in enumerate(views[0].image_ids)}
        self.places = [places[image_id] for image_id in table.image_ids]
        self.views, self.prompts, self.image_ids = [view.values for view in views], prompts, table.image_ids
        self.num_captions = [min(captions_per_image, len(captions)) for captions in table.captions]
        self.drop_text, self.flip, self.noise = drop_text, flip, noise
        self.scaling_factor, self.seed = scaling_factor, seed
        shape = self.views[0].shape[1:]
        self.x_0_shape = (shape[2], shape[0], shape[1]) if self.are_pixels else shape
        self.train, self.validation = np.array(table.rows(TRAIN)), np.array(table.validation_rows())
        self.num_train, self.num_validation = len(self.train), len(self.validation)

    def _draw(self, row: int, epoch: int | None) -> _Draw:
        """Always draws all numbers, so that one setting does not change the draws of another."""
        random = generator(self.seed, "row", "validation" if epoch is None else epoch, self.image_ids[row])
        mirrored, caption, dropped = torch.rand(3, generator=random, dtype=torch.float64).tolist()
        drawn = int(torch.randint(self.noise.num_timesteps, (1,), generator=random))
        noise = torch.randn(self.x_0_shape, generator=random)
        timestep = self.noise.timestep(drawn, float(torch.rand(1, generator=random, dtype=torch.float64)))
        if epoch is None:
            return _Draw(False, 0, timestep, noise)
        chosen = None if dropped < self.drop_text else int(caption * self.num_captions[row])
        return _Draw(self.flip and mirrored < 0.5, chosen, timestep, noise)

    def _x_0(self, rows: Sequence[int], mirrored: Sequence[bool]) -> torch.Tensor:
        """fp32 (B, C, H, W): pixels in [-1, 1], or scaled latents."""
        pairs = list(zip([self.places[row] for row in rows], mirrored, strict=True))
        if self.are_pixels:
            pixels = [self.views[0][place][:, ::-1] if mirror else self.views[0][place] for place, mirror in pairs]
            return to_network(torch.from_numpy(np.stack(pixels)))
        latents = np.stack([self.views[int(mirror)][place] for place, mirror in pairs])
        return torch.from_numpy(latents).float() * self.scaling_factor

    def _batch(self, rows: list[int], epoch: int | None) -> Batch:
        draws = [self._draw(row, epoch) for row in rows]
        return {
            "x_0": self._x_0(rows, [draw.mirrored for draw in draws]),
            "noise": torch.stack([draw.noise for draw in draws]),
            "timesteps": torch.tensor([draw.timestep for draw in draws]),
            **self.prompts.batch(rows, [draw.caption for draw in draws]),
        }

    def train_batch(self, indices: np.ndarray, epoch: int) -> Batch:
        return self._batch(self.train[indices].tolist(), epoch)

    def validation_batch(self, indices: np.ndarray) -> Batch:
        return self._batch(self.validation[indices].tolist(), None)

    def train_stream(self, epoch: int, rows_per_batch: int) -> Iterator[Batch] | None:
        return None


def scaling_factor(latents: np.ndarray) -> float:
    """The factor that scales latents (N, C, H, W) to a standard deviation of 1; `scaling_factor` in diffusers.

    Raises InputError if all latents are equal, that is if the autoencoder has collapsed.
    """
    deviation = float(latents.astype(np.float64).std())
    if not deviation > 0:
        raise InputError("the latents of the VQ-VAE are all equal: its training collapsed; train it again")
    return 1 / deviation
