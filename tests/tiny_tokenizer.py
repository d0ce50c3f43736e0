"""Infinity's tokenizer, small enough for a test to train in seconds, and a finished run of it."""

import dataclasses
from typing import Any

import tiny_vqvae

from mmcore import checkpoint
from mmcore.generators.facts import InfinityTokenizerFacts
from mmcore.generators.infinity_tokenizer import VARIANTS, InfinityTokenizerRecipe, InfinityTokenizerTraining
from mmcore.run_files import RunFile, write_model
from mmcore.storage import Storage

GRIDS = ((1, 1), (2, 2), (4, 4))
NUM_BITS = 6


def recipe(*, train: dict[str, Any] | None = None, **changes: Any) -> InfinityTokenizerRecipe:
    """16² pixels to 4² latents of 6 bits on three grids, discriminator from step 4."""
    base = dataclasses.replace(
        VARIANTS["smoke"],
        image_size=tiny_vqvae.SIZE,
        num_bits=NUM_BITS,
        factors=(1, 2),
        discriminator_channels=(8, 8),
        discriminator_from_step=4,
        train=tiny_vqvae.recipe(train=train).train,
    )
    return dataclasses.replace(base, **changes)


def write_run(run: Storage, seed: int = 0, **changes: Any) -> InfinityTokenizerTraining:
    """A finished run with initial weights, in the form that jobs/runtime/trainer.py leaves; returns its model."""
    model: InfinityTokenizerTraining = tiny_vqvae.model_of(recipe(**changes), seed)
    file = RunFile("infinity_tokenizer", "smoke", model.recipe, InfinityTokenizerFacts(), "x")
    write_model(run, checkpoint.trainable_state(model), file)
    return model
