"""Infinity's Transformer: it predicts all bits of a grid at once, grid after grid, from coarse to fine.

Han et al. 2024, https://arxiv.org/abs/2412.04431, section 3. Input is the sum of the grids so far, enlarged to the next
one. Output are two logits for each bit (the infinite-vocabulary classifier). `mmcore.generators.bsq` makes bits of
images, `infinity_scales` has the grids, `infinity_sampling` draws images, `infinity_weights` reads official files.

The text acts three times. Its pooled vector is the first position. The same vector shifts and scales every layer. Every
layer attends to the tokens.

Shapes: R rows of a batch, T text tokens, C channels of a text token, D width, L positions, K positions so far, H heads,
h width of a head, d bits of a position, N layers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.generators.infinity_scales import Grid, rope_places

_EPS = 1e-6
# Attention logits are cosines times at most this.
_MAX_COSINE_SCALE = 100.0
_FIRST_COSINE_SCALE = 4.0
MAX_GRIDS = 15
"""Embeddings of grids in the official files, of which 13 are used."""
_ROPE_BASE = 10_000.0
# The text is pooled with heads of this many of its channels.
_POOL_CHANNELS = 128


@dataclass(frozen=True)
class InfinitySettings:
    """Sizes of the Transformer. The defaults are those of Infinity-2B."""

    num_layers: int = 32
    """Number of layers: self-attention, cross-attention to the text, feed-forward."""
    width: int = 2048
    """Width of the layers."""
    num_heads: int = 16
    """Attention heads."""
    text_channels: int = 2048
    """Channels of a text token: 2,048 of flan-t5-xl."""
    max_text_tokens: int = 512
    """Longest prompt in tokens."""
    num_bits: int = 32
    """Bits of a position: those of the tokenizer, or four times as many with patches of 2 × 2."""

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layers: four times the width, to the nearest multiple of 256."""
        return round(self.width * 4 / 256) * 256


@dataclass(frozen=True)
class TextState:
    """What a batch of prompts gives to all layers. It is computed once an image."""

    pooled_RD: Tensor
    """The pooled text."""
    modulation_R6D: Tensor
    """Shared part of two gains, two scales and two shifts of each layer, fp32."""
    keys_values: list[tuple[Tensor, Tensor]]
    """For each layer: keys and values of the tokens, (R, H, T, h)."""
    mask_R11T: Tensor
    """Which tokens there are."""

    def first_rows(self, num: int) -> "TextState":
        """The state of the first `num` prompts."""
        keys_values = [(key[:num], value[:num]) for key, value in self.keys_values]
        return TextState(self.pooled_RD[:num], self.modulation_R6D[:num], keys_values, self.mask_R11T[:num])


class Cache:
    """Keys and values of all positions so far, in memory allocated once for the known length."""

    def __init__(self, settings: InfinitySettings, num_rows: int, length: int, like: Tensor) -> None:
        """`like` has the device and the dtype."""
        head_width = settings.width // settings.num_heads
        shape = (settings.num_layers, 2, num_rows, settings.num_heads, length, head_width)
        self.keys_values = like.new_empty(shape)
        self.length = 0

    def append(self, layer: int, key_RHLh: Tensor, value_RHLh: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all K positions after these L, (R, H, K, h). `advance` then moves on."""
        end = self.length + key_RHLh.shape[2]
        keys, values = self.keys_values[layer, :, : len(key_RHLh), :, :end]
        keys[:, :, self.length :] = key_RHLh
        values[:, :, self.length :] = value_RHLh
        return keys, values

    def advance(self, num_positions: int) -> None:
        """Keep the positions that all layers have appended."""
        self.length += num_positions


def rope_table(settings: InfinitySettings, grids: Sequence[Grid], finest: Grid) -> Tensor:
    """Cosine and sine of each position and pair of channels, fp32 (2, L, h / 2).

    The first half of the pairs turns with the row, the second half with the column (Su et al. 2021, arXiv 2104.09864).
    """
    half = settings.width // settings.num_heads // 2
    frequencies = 1.0 / _ROPE_BASE ** (torch.arange(0, half, 2).float() / half)
    places_L2 = rope_places(tuple(grids), finest).float()
    angles_Lh = (places_L2[:, :, None] * frequencies).flatten(1)
    return torch.stack([angles_Lh.cos(), angles_Lh.sin()])


def _turn(vectors_RHLh: Tensor, rope_2Lh: Tensor) -> Tensor:
    """Turn adjacent pairs of channels by the angles of their position, in fp32."""
    first, second = vectors_RHLh.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rope_2Lh
    return torch.stack([cosine * first - sine * second, sine * first + cosine * second], dim=-1).flatten(-2)


def _wide(values: Tensor) -> Tensor:
    """In fp32, or in fp64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _normalized(hidden_RLD: Tensor, scale_R1D: Tensor, shift_R1D: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift, in fp32."""
    return F.layer_norm(_wide(hidden_RLD), hidden_RLD.shape[-1:], eps=_EPS) * (1 + scale_R1D) + shift_R1D


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of the queries (R, H, L, h) to keys and values (R, H, K, h), where `mask` is true."""
    if query.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    # The backward pass of PyTorch's fused attention is slow on a CPU.
    scores_RHLK = query * scale @ key.transpose(-2, -1)
    if mask is not None:
        scores_RHLK = scores_RHLK.masked_fill(~mask, -torch.inf)
    return scores_RHLK.softmax(-1).to(value.dtype) @ value


class SelfAttention(nn.Module):
    """Cosine attention with rotary positions. The keys have no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.query_bias, self.value_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.log_scale_H = nn.Parameter(torch.full((num_heads,), math.log(_FIRST_COSINE_SCALE)))
        self.out = nn.Linear(width, width)

    def forward(self, hidden_RLD: Tensor, rope_2Lh: Tensor, mask_LK: Tensor | None, store: Callable | None) -> Tensor:
        """`store` appends to a cache; without one, `mask_LK` says what each position sees."""
        bias = torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        qkv = F.linear(hidden_RLD, self.qkv.weight, bias.to(self.qkv.weight.dtype))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scale_H = _wide(self.log_scale_H).clamp_max(math.log(_MAX_COSINE_SCALE)).exp()
        query = _turn(F.normalize(_wide(query), dim=-1) * scale_H[:, None, None], rope_2Lh).to(value.dtype)
        key = _turn(F.normalize(_wide(key), dim=-1), rope_2Lh).to(value.dtype)
        if store is not None:
            key, value = store(key, value)
        heads = _attend(query, key, value, mask_LK, 1.0)
        return self.out(heads.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention to the tokens of the text. The keys have no bias."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def keys_values(self, text_RTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, (R, H, T, h)."""
        return _keys_values(text_RTD, self.key_value, self.value_bias, self.num_heads)

    def forward(self, hidden_RLD: Tensor, keys_values: tuple[Tensor, Tensor], mask_R11T: Tensor) -> Tensor:
        query = self.query(hidden_RLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        heads = _attend(query, *keys_values, mask_R11T, query.shape[-1] ** -0.5)
        return self.out(heads.transpose(1, 2).flatten(2))


def pool_heads(text_channels: int) -> int:
    """Heads that pool a text of `text_channels`."""
    return max(1, text_channels // _POOL_CHANNELS)


class TextPool(nn.Module):
    """One learned query attends to the tokens of the text."""

    def __init__(self, text_channels: int, width: int) -> None:
        super().__init__()
        self.num_heads = pool_heads(text_channels)
        self.query_Hh = nn.Parameter(torch.empty(self.num_heads, width // self.num_heads))
        self.key_value = nn.Linear(text_channels, 2 * width, bias=False)
        self.value_bias = nn.Parameter(torch.zeros(width))
        self.out = nn.Linear(width, width)

    def forward(self, text_RTC: Tensor, mask_R11T: Tensor) -> Tensor:
        """(R, T, C) -> (R, D)."""
        keys_values = _keys_values(text_RTC, self.key_value, self.value_bias, self.num_heads)
        query = self.query_Hh[None, :, None].expand(len(text_RTC), -1, -1, -1).to(keys_values[0].dtype)
        heads = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask_R11T)
        return self.out(heads.flatten(1))


def _keys_values(text: Tensor, linear: nn.Linear, value_bias: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    bias = torch.cat([torch.zeros_like(value_bias), value_bias]).to(linear.weight.dtype)
    key, value = F.linear(text, linear.weight, bias).unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return key, value


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward. The text modulates the first and the last."""

    def __init__(self, settings: InfinitySettings) -> None:
        super().__init__()
        width = settings.width
        self.modulation_6D = nn.Parameter(torch.empty(6, width))
        self.self_attention = SelfAttention(width, settings.num_heads)
        self.cross_norm = nn.LayerNorm(width, eps=_EPS)
        self.cross_attention = CrossAttention(width, settings.num_heads)
        self.ffn = nn.Sequential(
            nn.Linear(width, settings.ffn_width), nn.GELU(approximate="tanh"), nn.Linear(settings.ffn_width, width)
        )

    def text_keys_values(self, text_RTD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the text's tokens, (R, H, T, h)."""
        return self.cross_attention.keys_values(text_RTD)

    def forward(
        self,
        hidden_RLD: Tensor,
        text: TextState,
        layer: int,
        rope_2Lh: Tensor,
        mask_LK: Tensor | None,
        store: Callable | None,
    ) -> Tensor:
        modulation = (_wide(self.modulation_6D) + text.modulation_R6D).unsqueeze(2).unbind(1)
        gain1, gain2, scale1, scale2, shift1, shift2 = modulation
        normalized = _normalized(hidden_RLD, scale1, shift1)
        hidden_RLD = hidden_RLD + self.self_attention(normalized, rope_2Lh, mask_LK, store) * gain1
        attended = self.cross_attention(self.cross_norm(hidden_RLD), text.keys_values[layer], text.mask_R11T)
        hidden_RLD = hidden_RLD + attended
        return hidden_RLD + self.ffn(_normalized(hidden_RLD, scale2, shift2)) * gain2


class InfinityTransformer(nn.Module):
    """The next-grid Transformer."""

    def __init__(self, settings: InfinitySettings) -> None:
        super().__init__()
        self.settings = settings
        width = settings.width
        self.no_text_TC = nn.Parameter(torch.empty(settings.max_text_tokens, settings.text_channels))
        self.text_norm = nn.RMSNorm(settings.text_channels, eps=_EPS)
        self.text_pool = TextPool(settings.text_channels, width)
        self.text_projection = nn.Sequential(
            nn.Linear(settings.text_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.first_position_D = nn.Parameter(torch.empty(width))
        self.grid_embedding = nn.Embedding(MAX_GRIDS, width)
        self.bit_embedding = nn.Linear(settings.num_bits, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList([Block(settings) for _ in range(settings.num_layers)])
        self.head_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.head = nn.Linear(width, 2 * settings.num_bits)
        for computed_in_fp32 in (self.modulation, self.head_modulation, self.head):
            setattr(computed_in_fp32, "own_precision", True)  # noqa: B010 - a module has no such field for mypy

    def layers(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.blocks)

    def text_state(self, text_RTC: Tensor, mask_RT: Tensor) -> TextState:
        """What the layers need of the prompts. Padding has no effect.

        Args:
            text_RTC: token features of the text encoder.
            mask_RT: which tokens there are; each prompt has at least one.
        """
        mask_R11T = mask_RT[:, None, None]
        normalized_RTC = self.text_norm(_wide(text_RTC)).to(text_RTC.dtype)
        pooled_RD = self.text_pool(normalized_RTC, mask_R11T)
        text_RTD = self.text_projection(normalized_RTC)
        with torch.autocast(pooled_RD.device.type, enabled=False):
            modulation = self.modulation(_wide(pooled_RD)).unflatten(-1, (6, -1))
        return TextState(
            pooled_RD=pooled_RD,
            modulation_R6D=modulation,
            keys_values=[block.text_keys_values(text_RTD) for block in self.layers()],
            mask_R11T=mask_R11T,
        )

    def embed(self, text: TextState, number: int, inputs_RLd: Tensor | None) -> Tensor:
        """What enters the layers for grid `number`, (R, L, D). The first grid has no inputs but the text."""
        if inputs_RLd is None:
            hidden_RLD = (text.pooled_RD + self.first_position_D)[:, None]
        else:
            hidden_RLD = self.bit_embedding(inputs_RLd)
        return _wide(hidden_RLD + self.grid_embedding.weight[number])

    def logits(self, hidden_RLD: Tensor, pooled_RD: Tensor) -> Tensor:
        """Two logits for each bit, fp32 (R, L, d, 2): of bit 0 and of bit 1."""
        with torch.autocast(hidden_RLD.device.type, enabled=False):
            scale, shift = self.head_modulation(_wide(pooled_RD)).unflatten(-1, (2, 1, -1)).unbind(1)
            return self.head(_normalized(hidden_RLD, scale, shift)).unflatten(-1, (-1, 2))

    def forward(self, text: TextState, inputs: Sequence[Tensor], grids: Sequence[Grid], finest: Grid) -> Tensor:
        """Logits of all bits of all grids at once, for training: fp32 (R, L, d, 2).

        Args:
            text: of `text_state`.
            inputs: for each grid but the first, the sum of the grids before it, (R, d, h, w).
            grids: from coarse to fine.
            finest: last grid of the ratio's largest schedule, which the positions refer to.
        """
        hidden = [self.embed(text, 0, None)]
        for number, each in enumerate(inputs, 1):
            hidden.append(self.embed(text, number, each.flatten(2).transpose(1, 2)))
        hidden_RLD = torch.cat(hidden, dim=1)
        number_L = torch.cat([torch.full((h * w,), number) for number, (h, w) in enumerate(grids)])
        # A position sees its own grid and the coarser ones.
        mask_LL = (number_L[:, None] >= number_L).to(hidden_RLD.device)
        rope_2Lh = rope_table(self.settings, grids, finest).to(hidden_RLD.device)
        for layer, block in enumerate(self.blocks):
            hidden_RLD = block(hidden_RLD, text, layer, rope_2Lh, mask_LL, None)
        return self.logits(hidden_RLD, text.pooled_RD)

    def step(
        self,
        hidden_RLD: Tensor,
        text: TextState,
        rope_2Lh: Tensor,
        cache: Cache,
        after_layer: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Run the positions of one grid through all layers after those in the cache: (R, L, D) -> (R, L, D)."""
        for layer, block in enumerate(self.blocks):

            def store(key: Tensor, value: Tensor, layer: int = layer) -> tuple[Tensor, Tensor]:
                return cache.append(layer, key, value)

            hidden_RLD = block(hidden_RLD, text, layer, rope_2Lh, None, store)
            if after_layer is not None:
                hidden_RLD = after_layer(layer, hidden_RLD)
        cache.advance(hidden_RLD.shape[1])
        return hidden_RLD
