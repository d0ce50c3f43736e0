"""A VQ-VAE, images and a run of any autoencoder, small enough for a test to train in seconds."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from mmcore.data.columns import Column
from mmcore.data.pixels import PixelRows
from mmcore.generators.autoencoder_training import AutoencoderTraining
from mmcore.generators.infinity_tokenizer import InfinityTokenizerRecipe
from mmcore.generators.vqvae import VARIANTS, VQVAERecipe
from mmcore.recipe import TrainSettings
from mmcore.training import RunHooks, Training

SIZE = 16


def recipe(*, train: dict[str, Any] | None = None, **changes: Any) -> VQVAERecipe:
    """16² pixels to 8² latents of 4 channels, 32 codes of moving averages with revival, discriminator from step 4."""
    settings = TrainSettings(
        num_epochs=4,
        batch_size=8,
        lr=3e-3,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        warmup_steps=3,
        schedule="cosine",
        clip_grad_norm=1.0,
        precision="fp32",
        checkpoint_every_steps=3,
        log_every_steps=1,
    )
    base = dataclasses.replace(
        VARIANTS["smoke"],
        image_size=SIZE,
        channels=(8, 8),
        norm_groups=4,
        num_codes=32,
        revive_below=0.2,
        discriminator_channels=(8, 8),
        discriminator_from_step=4,
        train=dataclasses.replace(settings, **(train or {})),
    )
    return dataclasses.replace(base, **changes)


def images(num_rows: int) -> np.ndarray:
    """uint8 (N, 16, 16, 3): a bright rectangle on a coloured gradient, from one seed."""
    random = np.random.default_rng(0)
    slope = np.linspace(0, 1, SIZE)
    made = random.uniform(0, 90, (num_rows, 1, 1, 3)) + random.uniform(0, 90, (num_rows, 1, 1, 3)) * slope[:, None]
    made = np.broadcast_to(made, (num_rows, SIZE, SIZE, 3)).copy()
    for image in made:
        top, left = random.integers(0, SIZE - 6, 2)
        image[top : top + 6, left : left + 6] = random.uniform(150, 255, 3)
    return made.astype(np.uint8)


def rows_of(recipe: VQVAERecipe | InfinityTokenizerRecipe, num_train: int = 40, num_validation: int = 12) -> PixelRows:
    facts = tiny.table(num_train, num_validation)
    column = Column(tuple(facts.image_ids), images(num_train + num_validation))
    return PixelRows(facts, column, flip=recipe.flip, seed=recipe.train.seed)


def model_of(recipe: VQVAERecipe | InfinityTokenizerRecipe, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return recipe.build_training()


@dataclasses.dataclass
class Run:
    """The results of a run in this process."""

    training: Training
    best: dict[str, torch.Tensor]
    checkpoints: list[Path]


def train(
    recipe: VQVAERecipe | InfinityTokenizerRecipe,
    folder: Path,
    *,
    resume_from: Path | None = None,
    model: AutoencoderTraining | None = None,
    **rows: int,
) -> Run:
    """Train in this process and keep every checkpoint under `folder`."""
    kept: list[Path] = []

    def commit(checkpoint: Path | None, metrics: dict[str, Any]) -> None:
        if checkpoint is not None:
            kept.append(Path(shutil.move(checkpoint, folder / checkpoint.name)))

    folder.mkdir(parents=True, exist_ok=True)
    training = Training(
        model_of(recipe) if model is None else model,
        rows_of(recipe, **rows),
        recipe.train,
        RunHooks(commit=commit),
        workdir=folder / "work",
        resume_from=resume_from,
    )
    return Run(training, training.run(), kept)
