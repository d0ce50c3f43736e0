"""Architectures of published models, written in code, so that sizes are known without a download.

The models are those that the variants of the recipes name. The numbers are those of their `config.json` on the hub.
They are built on PyTorch's meta device, which has shapes and no values.
"""

from typing import Any

import torch
from torch import nn

from mmcore.errors import InputError
from mmcore.frozen.vision import PATCH, Tokens


def _unknown(name: str) -> InputError:
    return InputError(f"{name!r}: its published sizes are not known; add them to mmcore/frozen/published.py")


def vision_model(name: str) -> nn.Module:
    """The vision model `name`, as `mmcore.frozen.vision` reads it. Raises InputError for one that is not here."""
    from transformers import (
        Blip2VisionConfig,
        Blip2VisionModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        ResNetConfig,
        ResNetModel,
    )

    with torch.device("meta"):
        match name:
            case "microsoft/resnet-18":
                return ResNetModel(ResNetConfig(depths=[2] * 4, hidden_sizes=[64, 128, 256, 512], layer_type="basic"))
            case "openai/clip-vit-base-patch32":
                return CLIPVisionModel(CLIPVisionConfig(**_transformer(768, 12), patch_size=32))
            case "Salesforce/blip2-itm-vit-g":
                # EVA-CLIP's ViT-g/14 without the last of its 40 layers.
                sizes = _transformer(1408, 39, num_attention_heads=16, intermediate_size=6144)
                return Blip2VisionModel(Blip2VisionConfig(**sizes, patch_size=14))
    raise _unknown(name)


def text_model(name: str) -> Any:
    """The text encoder `name`, as `mmcore.frozen.text` reads it. Raises InputError for one that is not here."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        match name:
            case "bert-base-uncased":
                return BertModel(BertConfig(**_transformer(768, 12), vocab_size=30_522, max_position_embeddings=512))
            case "openai/clip-vit-base-patch16":
                return CLIPTextModel(
                    CLIPTextConfig(**_transformer(512, 12), vocab_size=49_408, max_position_embeddings=77)
                )
    raise _unknown(name)


def language_model(name: str) -> Any:
    """The causal language model `name`. Raises InputError for one that is not here."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        match name:
            case "TinyLlama/TinyLlama-1.1B-Chat-v1.0":
                sizes = _transformer(2048, 22, num_attention_heads=32, intermediate_size=5632)
                return LlamaForCausalLM(
                    LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=32_000, tie_word_embeddings=False)
                )
    raise _unknown(name)


def num_parameters(module: nn.Module) -> int:
    """Tied weights count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _transformer(width: int, num_layers: int, **others: int) -> dict[str, Any]:
    """The sizes of a Transformer of BERT's proportions, or `others`."""
    sizes = {"num_attention_heads": width // 64, "intermediate_size": 4 * width}
    return {"hidden_size": width, "num_hidden_layers": num_layers, **sizes, **others}


@torch.no_grad()
def token_shape(model: nn.Module, image_size: int, tokens: Tokens) -> tuple[int, int]:
    """Tokens of an image and their channels, as `FrozenVisionEncoder.token_shape`."""
    outputs = model(torch.empty(1, 3, image_size, image_size, device="meta"))
    if tokens != PATCH:
        return 1, outputs.pooler_output.shape[1]
    hidden = outputs.last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden
    return hidden.shape[1], hidden.shape[2]
