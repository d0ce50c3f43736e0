"""Tiny official files of Infinity with random weights: a Transformer, a tokenizer and a T5."""

import dataclasses
from pathlib import Path

import torch
from torch import nn
from transformers import T5Config, T5EncoderModel

from mmcore.frozen.text import PromptTokenizer
from mmcore.generators.infinity import InfinitySettings, InfinityTransformer
from mmcore.generators.infinity_vae import InfinityVae, InfinityVaeSettings
from mmcore.generators.infinity_weights import official_transformer

CAPTIONS = ["a red circle", "a red square", "a blue circle", "a blue square"]
SETTINGS = InfinitySettings(num_layers=2, width=64, num_heads=2, text_channels=16, max_text_tokens=8, num_bits=4)
VAE = InfinityVaeSettings(num_bits=4, width=32, factors=(1, 1, 1, 1, 1), num_blocks=1)
PATCHED_VAE = InfinityVaeSettings(num_bits=1, width=32, factors=(1, 1, 1, 1), num_blocks=1)


def random_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def write_transformer(folder: Path, settings: InfinitySettings = SETTINGS) -> str:
    torch.manual_seed(0)
    model = InfinityTransformer(settings)
    random_weights(model)
    torch.save(official_transformer(model, 1), folder / "transformer.pth")
    return str(folder / "transformer.pth")


def write_vae(folder: Path, settings: InfinityVaeSettings = VAE) -> str:
    torch.manual_seed(1)
    name = "-".join(map(str, dataclasses.astuple(settings)[:2]))
    torch.save(InfinityVae(settings).state_dict(), folder / f"vae-{name}.pth")
    return str(folder / f"vae-{name}.pth")


def write_text_encoder(folder: Path, width: int = 16) -> str:
    torch.manual_seed(2)
    folder.mkdir()
    config = T5Config(
        vocab_size=32, d_model=width, d_ff=32, d_kv=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    model = T5EncoderModel(config)
    random_weights(model)
    model.save_pretrained(folder)
    for name, data in PromptTokenizer.of_words(CAPTIONS, SETTINGS.max_text_tokens).files().items():
        (folder / name).write_bytes(data)
    return str(folder)
