"""Numbers of parameters of generators and autoencoders at full size, without data and without a download."""

import dataclasses
from typing import Any

import torch
from torch import nn

from mmcore.frozen import published
from mmcore.frozen.published import num_parameters
from mmcore.frozen.text import TextInputs
from mmcore.generators.autoregressive import AutoregressiveRecipe
from mmcore.generators.facts import AutoregressiveFacts, DiffusionFacts, InfinityFacts
from mmcore.generators.infinity_tokenizer import InfinityTokenizerRecipe
from mmcore.generators.pixel_diffusion import PixelDiffusionRecipe
from mmcore.generators.sdxl import build
from mmcore.generators.sdxl_lora import SdxlLora, SdxlLoraRecipe
from mmcore.generators.text_context import TextSettings
from mmcore.generators.vqvae import VQVAERecipe

# Words of the captions of the report's 7,000 training images that occur at least twice, with the special tokens.
_WORDS = 4_878


def sizes(recipe: Any, autoencoder: VQVAERecipe | InfinityTokenizerRecipe) -> tuple[int, int]:
    """Total and trainable parameters. The total includes the frozen text encoder and the frozen autoencoder.

    `autoencoder`: the recipe of the one whose latents or codes `recipe` generates. An autoencoder itself counts with
    its discriminator, without the frozen network of the perceptual loss.
    Raises InputError for a frozen model that `mmcore.frozen.published` does not have.
    """
    if isinstance(recipe, VQVAERecipe | InfinityTokenizerRecipe):
        with torch.device("meta"):
            trained = num_parameters(dataclasses.replace(recipe, perceptual=None).build_training())
        return trained, trained
    if isinstance(recipe, SdxlLoraRecipe):
        with torch.device("meta"):
            parts = build()
            adapted = SdxlLora(parts.unet, recipe, torch.empty(1), "epsilon", 1.0)
        trainable = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
        return num_parameters(adapted) + sum(map(num_parameters, parts[1:])), trainable
    text_inputs, num_frozen = _text(recipe.text)
    model: nn.Module
    with torch.device("meta"):
        if isinstance(recipe, PixelDiffusionRecipe):
            model = recipe.build(DiffusionFacts(text_inputs, (3, recipe.image_size, recipe.image_size)))
        else:
            num_frozen += num_parameters(autoencoder.build())
            if isinstance(autoencoder, InfinityTokenizerRecipe):
                model = recipe.build(InfinityFacts(text_inputs, autoencoder.latent_shape, autoencoder.grids))
            elif isinstance(recipe, AutoregressiveRecipe):
                shape = autoencoder.latent_shape[1:]
                model = recipe.build(AutoregressiveFacts(text_inputs, shape, autoencoder.num_codes))
            else:
                model = recipe.build(DiffusionFacts(text_inputs, autoencoder.latent_shape))
    trainable = num_parameters(model)
    return num_frozen + trainable, trainable


def _text(settings: TextSettings) -> tuple[TextInputs, int]:
    """The text inputs of the network, and the parameters of the frozen text encoder."""
    if settings.is_scratch:
        return TextInputs(vocabulary_size=_WORDS, pad_id=0, bos_id=1, eos_id=2), 0
    model = published.text_model(settings.text_encoder)
    return TextInputs(width=model.config.hidden_size), num_parameters(model)
