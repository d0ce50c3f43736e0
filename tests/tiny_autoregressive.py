"""A finished run of an autoregressive Transformer over VQ-VAE codes, with random weights and without training."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_runs import text_facts, write, write_vqvae_run

from mmcore import checkpoint
from mmcore.generators.autoregressive import VARIANTS
from mmcore.generators.facts import AutoregressiveFacts


def write_run(folder: Path, of_vqvae: Mapping[str, Any] | None = None, **changes: Any) -> Path:
    """Images of 32² from 8² codes. `changes` apply to the recipe, `of_vqvae` to the recipe of its VQ-VAE."""
    vqvae, fingerprint = write_vqvae_run(folder / "model" / "vqvae", **(of_vqvae or {}))
    recipe = dataclasses.replace(VARIANTS["smoke"], **changes)
    inputs, text_fingerprint = text_facts(folder, recipe.text)
    facts = AutoregressiveFacts(
        inputs,
        vqvae.latent_shape[1:],
        vqvae.num_codes,
        resolution=vqvae.image_size,
        autoencoder_fingerprint=fingerprint,
        text_fingerprint=text_fingerprint,
    )
    torch.manual_seed(0)
    model = recipe.build(facts)
    with torch.no_grad():
        # Initially the layers add nothing and all codes are equally likely. Here the prompt must have an effect.
        for weight in (model.output.weight, *model.layers.parameters()):
            if weight.ndim > 1:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    write(folder, "autoregressive", recipe, facts, checkpoint.trainable_state(model))
    return folder
