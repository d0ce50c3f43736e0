"""A finished run of Infinity with random weights and without training."""

import dataclasses
from pathlib import Path
from typing import Any

import tiny_tokenizer
import torch
from tiny_runs import text_facts, write

from mmcore import checkpoint
from mmcore.generators.facts import InfinityFacts
from mmcore.generators.infinity_recipe import VARIANTS
from mmcore.run_files import TOKENIZER_OF_BITS_ASSET
from mmcore.storage import Storage
from mmcore.trained.autoencoder import open_tokenizer


def write_run(folder: Path, **changes: Any) -> Path:
    """Images of 16² on grids of 1, 2 and 4 positions a side. `changes` apply to the recipe."""
    run = folder / "model" / TOKENIZER_OF_BITS_ASSET
    tiny_tokenizer.write_run(Storage(str(run)))
    tokenizer = open_tokenizer(str(run)).load()
    recipe = dataclasses.replace(VARIANTS["smoke"], **changes)
    inputs, text_fingerprint = text_facts(folder, recipe.text)
    facts = InfinityFacts(
        inputs,
        tokenizer.latent_shape,
        tokenizer.recipe.grids,
        resolution=tokenizer.image_size,
        autoencoder_fingerprint=tokenizer.fingerprint(),
        text_fingerprint=text_fingerprint,
    )
    torch.manual_seed(0)
    model = recipe.build(facts)
    with torch.no_grad():
        # At first all bits are equally likely. Here prompt and seed must have an effect.
        for parameter in model.transformer.parameters():
            parameter.normal_(std=0.3)
        model.transformer.head.weight.mul_(0.1)
    write(folder, "infinity", recipe, facts, checkpoint.trainable_state(model))
    return folder
