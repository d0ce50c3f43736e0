"""The architecture of Stable Diffusion XL: its parts without weights, at full size and tiny.

Podell et al. 2023, https://arxiv.org/abs/2307.01952. The settings of the full size are those of the configuration files
of stabilityai/stable-diffusion-xl-base-1.0. The classes are those of diffusers and transformers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

FACTOR = 8
"""Side of an image divided by the side of its latents."""
NUM_TOKENS = 77
"""Tokens of a prompt, padded."""


@dataclass(frozen=True)
class TextSizes:
    """Sizes of one of the two CLIP text encoders."""

    width: int
    num_layers: int
    num_heads: int
    activation: str
    projection: int | None = None
    """Width of the pooled vector; None for the encoder without one."""


@dataclass(frozen=True)
class SdxlSizes:
    """Sizes of all parts. The defaults are those of SDXL-base-1.0."""

    sample_size: int = 128
    """Side of the latents that the U-Net was made for."""
    unet_channels: tuple[int, ...] = (320, 640, 1280)
    """Channels of each level of the U-Net."""
    transformer_layers: tuple[int, ...] = (1, 2, 10)
    """Transformer layers of an attention block of each level. The first level has none of these blocks."""
    unet_heads: tuple[int, ...] = (5, 10, 20)
    """Attention heads of each level."""
    layers_per_block: int = 2
    """Residual blocks of a level; the way up has one more."""
    size_channels: int = 256
    """Channels of the embedding of each of the six numbers of size and crop."""
    unet_groups: int = 32
    """Groups of each GroupNorm of the U-Net."""
    vae_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level of the VAE."""
    vae_groups: int = 32
    """Groups of each GroupNorm of the VAE."""
    vocabulary_size: int = 49408
    """Tokens of both text encoders."""
    text: TextSizes = TextSizes(768, 12, 12, "quick_gelu")
    """CLIP ViT-L's text encoder."""
    text_2: TextSizes = TextSizes(1280, 32, 20, "gelu", projection=1280)
    """OpenCLIP ViT-bigG's text encoder, which also gives the pooled vector."""

    @property
    def text_width(self) -> int:
        """Width of a text token: both encoders side by side."""
        return self.text.width + self.text_2.width


FULL = SdxlSizes()
"""SDXL-base-1.0."""
TINY = SdxlSizes(
    sample_size=8,
    unet_channels=(8, 16, 16),
    transformer_layers=(1, 1, 1),
    unet_heads=(2, 2, 2),
    layers_per_block=1,
    size_channels=4,
    unet_groups=4,
    vae_channels=(4, 8, 8, 8),
    vae_groups=4,
    vocabulary_size=600,
    text=TextSizes(16, 2, 2, "quick_gelu"),
    text_2=TextSizes(24, 2, 2, "gelu", projection=24),
)
"""A model of the same parts that makes an image of 64 pixels a side in a fraction of a second."""


class SdxlParts(NamedTuple):
    """The four networks, with random weights."""

    unet: Any
    vae: Any
    text_encoder: Any
    text_encoder_2: Any


def build_unet(sizes: SdxlSizes = FULL) -> Any:
    """diffusers' UNet2DConditionModel of SDXL."""
    from diffusers import UNet2DConditionModel

    assert sizes.text_2.projection is not None, "the second text encoder gives the pooled vector"
    return UNet2DConditionModel(
        sample_size=sizes.sample_size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet_channels,
        layers_per_block=sizes.layers_per_block,
        norm_num_groups=sizes.unet_groups,
        cross_attention_dim=sizes.text_width,
        transformer_layers_per_block=sizes.transformer_layers,
        # In this class the field holds the number of heads.
        attention_head_dim=sizes.unet_heads,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes.size_channels,
        projection_class_embeddings_input_dim=6 * sizes.size_channels + sizes.text_2.projection,
    )


def build_vae(sizes: SdxlSizes = FULL) -> Any:
    """diffusers' AutoencoderKL of SDXL."""
    from diffusers import AutoencoderKL

    levels = len(sizes.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae_channels,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=sizes.vae_groups,
        sample_size=sizes.sample_size * FACTOR,
        scaling_factor=0.13025,
    )


def build_text_encoders(sizes: SdxlSizes = FULL) -> tuple[Any, Any]:
    """transformers' two CLIP text encoders of SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(text: TextSizes) -> CLIPTextConfig:
        fields: dict[str, Any] = {} if text.projection is None else {"projection_dim": text.projection}
        return CLIPTextConfig(
            vocab_size=sizes.vocabulary_size,
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            hidden_act=text.activation,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=sizes.vocabulary_size - 2,
            eos_token_id=sizes.vocabulary_size - 1,
            pad_token_id=sizes.vocabulary_size - 1,
            **fields,
        )

    return CLIPTextModel(config(sizes.text)), CLIPTextModelWithProjection(config(sizes.text_2))


def build(sizes: SdxlSizes = FULL) -> SdxlParts:
    """All four networks, with random weights and in evaluation mode. Under ``torch.device("meta")`` without memory."""
    parts = SdxlParts(build_unet(sizes), build_vae(sizes), *build_text_encoders(sizes))
    for part in parts:
        assert isinstance(part, nn.Module)
        part.eval()
    return parts


def at_size(sizes: SdxlSizes, side: int) -> SdxlSizes:
    """The same model, made for images of `side` pixels a side."""
    return dataclasses.replace(sizes, sample_size=side // FACTOR)


def write_tiny(folder: str, seed: int = 0) -> None:
    """Write a diffusers folder of StableDiffusionXLPipeline with `TINY` parts and random weights, as safetensors.

    Its tokenizers know single letters. Tests and the variant `smoke` use it, as it needs no download.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = build(TINY)
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    ids = {word: number for number, word in enumerate(words)}
    ids |= {"<|startoftext|>": TINY.vocabulary_size - 2, "<|endoftext|>": TINY.vocabulary_size - 1}
    tokenizers = [
        CLIPTokenizer(vocab=ids, merges=[], pad_token=pad, model_max_length=NUM_TOKENS)
        for pad in ("<|endoftext|>", "!")
    ]
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline: Any = StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        text_encoder_2=parts.text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=parts.unet,
        scheduler=scheduler,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
