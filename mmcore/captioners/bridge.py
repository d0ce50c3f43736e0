"""Bridges from the tokens of a frozen image encoder to tokens of a language model's width. All have the same call.

* ``linear``: one Linear for each image token (LLaVA: Liu et al. 2023, arXiv 2304.08485).
* ``mlp``: Linear, GELU, Linear (LLaVA-1.5: Liu et al. 2023, arXiv 2310.03744).
* ``qformer``: learned queries that read the image, and one Linear (BLIP-2: Li et al. 2023, arXiv 2301.12597).
  They may read an instruction too (InstructBLIP: Dai et al. 2023, arXiv 2305.06500).
* ``resampler``: learned latents that attend to the image and to each other (Flamingo: Alayrac et al. 2022, arXiv
  2204.14198, appendix A.1.1), and one Linear.

The first two give as many tokens as the image has, the others `num_queries`.

Shapes: B images, L image tokens, E channels of an image token, Q tokens of the bridge, D width of the bridge, T tokens
of an instruction, W width of the language model, H heads, K = D / H width of a head.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.qformer import QFormer
from mmcore.captioners.qformer_layers import QFormerSettings
from mmcore.decoder import attention, merge_heads, split_heads
from mmcore.errors import InputError, check_at_least_one, check_share
from mmcore.frozen.vision import SCRATCH

# An instruction as token ids and a mask, both (B, T).
Instruction = tuple[Tensor, Tensor]
# Standard deviation of the initial latents.
_LATENT_STD = 0.02
# Flamingo's feed-forward layers are four times as wide as the latents.
_FFN_FACTOR = 4


@dataclass(frozen=True)
class BridgeSettings:
    """Kind and sizes of a bridge."""

    bridge: Literal["linear", "mlp", "qformer", "resampler"] = "qformer"
    """linear (LLaVA), mlp (LLaVA-1.5), qformer (BLIP-2) or resampler (Flamingo)."""
    num_queries: int = 32
    """Tokens that the Q-Former or the resampler gives for an image."""
    bridge_width: int = 768
    """Width of the Q-Former or the resampler."""
    bridge_layers: int = 12
    """Layers of the Q-Former or the resampler; Flamingo's resampler has 6."""
    bridge_heads: int = 12
    """Attention heads of the Q-Former or the resampler."""
    bridge_dropout: float = 0.1
    """Dropout of the Q-Former."""
    bridge_weights: str = SCRATCH
    """First weights: a finished run of train_qformer.py or train_qformer_llm.py, a BLIP-2 or a BERT. They decide the
    sizes of a Q-Former. `scratch` begins at random."""
    instruct: bool = False
    """Give the prompt to the Q-Former too (InstructBLIP)."""
    instruct_tokenizer: str = "bert-base-uncased"
    """Tokenizer of the prompt for the Q-Former, by name or folder."""

    def check(self) -> None:
        """Raise InputError for invalid settings. The recipe calls this: tyro would reformat an error of a nested
        field."""
        check_at_least_one(self, "num_queries", "bridge_width", "bridge_layers", "bridge_heads")
        check_share(self, "bridge_dropout")
        if self.bridge_width % self.bridge_heads:
            raise InputError(
                f"bridge_heads {self.bridge_heads} does not divide bridge_width {self.bridge_width}; change "
                "--bridge-heads or --bridge-width"
            )
        if self.instruct and self.bridge != "qformer":
            raise InputError(f"instruct: a bridge of kind {self.bridge} reads no prompt; give --bridge qformer")

    def without_effect(self) -> dict[str, str]:
        """Fields without effect under the other settings, each with the flag that would make it effective."""
        ignored = {} if self.instruct else {"instruct_tokenizer": "--instruct"}
        if self.bridge != "qformer":
            ignored["bridge_dropout"] = "--bridge qformer"
        sizes = ("bridge_width", "bridge_layers", "bridge_heads")
        if self.bridge in ("linear", "mlp"):
            ignored |= dict.fromkeys(("num_queries", *sizes), "--bridge qformer")
        elif self.bridge == "qformer" and self.bridge_weights != SCRATCH:
            ignored |= dict.fromkeys(sizes, f"--bridge-weights {SCRATCH}")
        return ignored

    def num_tokens(self, image_tokens: int) -> int:
        """Tokens that the bridge gives for an image of `image_tokens` tokens."""
        return image_tokens if self.bridge in ("linear", "mlp") else self.num_queries


def qformer_sizes(settings: BridgeSettings, image_width: int, vocabulary_size: int | None = None) -> QFormerSettings:
    """The sizes of a Q-Former that begins at random. `vocabulary_size`: tokens of the instruction's tokenizer."""
    return QFormerSettings(
        vocabulary_size=vocabulary_size,
        width=settings.bridge_width,
        num_layers=settings.bridge_layers,
        num_heads=settings.bridge_heads,
        ffn_width=4 * settings.bridge_width,
        num_queries=settings.num_queries,
        memory_width=image_width,
        dropout=settings.bridge_dropout,
        attention_dropout=settings.bridge_dropout,
    )


def build_bridge(
    settings: BridgeSettings,
    image_width: int,
    width: int,
    vocabulary_size: int | None = None,
    *,
    sizes: QFormerSettings | None = None,
    image_norm: bool = False,
) -> nn.Module:
    """The bridge from image tokens (B, L, `image_width`) to (B, Q, `width`).

    ``bridge(image_BLE, instruction)`` takes an instruction only if `settings.instruct`.

    Args:
        vocabulary_size: tokens of the instruction's tokenizer.
        sizes: of a pretrained Q-Former, instead of those of `settings`.
        image_norm: whether a LayerNorm is before the Q-Former.
    """
    match settings.bridge:
        case "linear":
            return PerToken(nn.Linear(image_width, width))
        case "mlp":
            return PerToken(nn.Sequential(nn.Linear(image_width, width), nn.GELU(), nn.Linear(width, width)))
        case "qformer":
            assert settings.instruct == (vocabulary_size is not None), "an instruction needs a vocabulary"
            sizes = sizes or qformer_sizes(settings, image_width, vocabulary_size)
            return QFormerBridge(sizes, width, image_norm=image_norm)
        case "resampler":
            return Resampler(settings, image_width, width)


class PerToken(nn.Module):
    """A projection of each image token."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, image_BLE: Tensor, instruction: Instruction | None = None) -> Tensor:
        """(B, L, E) -> (B, L, W)"""
        assert instruction is None, "this bridge reads no instruction"
        return self.projection(image_BLE)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return []


class QFormerBridge(nn.Module):
    """A Q-Former and one Linear."""

    def __init__(self, sizes: QFormerSettings, width: int, *, image_norm: bool = False) -> None:
        super().__init__()
        self.image_norm = nn.LayerNorm(sizes.memory_width) if image_norm else nn.Identity()
        self.qformer = QFormer(sizes)
        self.qformer.lm_head = None  # it writes nothing here
        self.projection = nn.Linear(sizes.width, width)

    def forward(self, image_BLE: Tensor, instruction: Instruction | None = None) -> Tensor:
        """(B, L, E) -> (B, Q, W)"""
        image_BLE = self.image_norm(image_BLE)
        if instruction is None:
            return self.projection(self.qformer.queries(image_BLE).hidden_BQD)
        return self.projection(self.qformer.multimodal(image_BLE, *instruction)[0])

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return self.qformer.blocks()


class ResamplerLayer(nn.Module):
    """Attention of latents to the image and the latents, then a feed-forward layer with squared ReLU; no biases."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.image_norm, self.latent_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ffn_in = nn.Linear(width, _FFN_FACTOR * width, bias=False)
        self.ffn_out = nn.Linear(_FFN_FACTOR * width, width, bias=False)

    def forward(self, latents_BQD: Tensor, image_BLD: Tensor) -> Tensor:
        """(B, Q, D) and (B, L, D) -> (B, Q, D)"""
        normed_BQD = self.latent_norm(latents_BQD)
        keys_values = self.kv(torch.cat([self.image_norm(image_BLD), normed_BQD], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(each, self.num_heads) for each in (self.q(normed_BQD), *keys_values))
        # On a CPU the backward pass of PyTorch's fused kernel is slower than two products.
        mixed_BHQK = attention(q, k, v, fused=q.device.type != "cpu")
        latents_BQD = latents_BQD + self.out(merge_heads(mixed_BHQK))
        return latents_BQD + self.ffn_out(F.relu(self.ffn_in(self.ffn_norm(latents_BQD))).square())


class Resampler(nn.Module):
    """Flamingo's perceiver resampler for one image, so without its time embeddings.

    Flamingo's latents have the width of the image tokens. Here a Linear brings the image tokens to `bridge_width`.
    """

    def __init__(self, settings: BridgeSettings, image_width: int, width: int) -> None:
        super().__init__()
        self.input = nn.Linear(image_width, settings.bridge_width)
        self.latents_QD = nn.Parameter(_LATENT_STD * torch.randn(settings.num_queries, settings.bridge_width))
        self.layers = nn.ModuleList(
            ResamplerLayer(settings.bridge_width, settings.bridge_heads) for _ in range(settings.bridge_layers)
        )
        self.norm = nn.LayerNorm(settings.bridge_width)
        self.projection = nn.Linear(settings.bridge_width, width)

    def forward(self, image_BLE: Tensor, instruction: Instruction | None = None) -> Tensor:
        """(B, L, E) -> (B, Q, W)"""
        assert instruction is None, "this bridge reads no instruction"
        image_BLD = self.input(image_BLE)
        latents_BQD = self.latents_QD.expand(len(image_BLE), -1, -1)
        for layer in self.layers:
            latents_BQD = layer(latents_BQD, image_BLD)
        return self.projection(self.norm(latents_BQD))

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return list(self.layers)
