"""The layers of a Transformer decoder with a key-value cache (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

The model around the layers adds token embeddings, position embeddings and the output layer. The tokens are words of a
caption or codes of an image. Training uses packed tokens: linear layers compute the real tokens only, and attention
uses the padded layout. The rows of one image, such as its captions, share the keys and values of its memory.

Shapes: B images, C rows (captions, beams) per image, R = B·C rows, T query positions, S key positions, N real tokens of
the batch, L tokens of a memory, D width, M width of a memory, H heads, K = D / H width of a head.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Avoids a division by zero for a head of zeros.
_EPSILON = 1e-6


@dataclass
class Packing:
    """Which positions of (R, T) are real tokens."""

    index_N: Tensor | None  # index of each real token in the flattened (R·T); None if all are real
    num_rows: int
    num_positions: int

    @classmethod
    def from_lengths(cls, lengths_R: Tensor, num_positions: int) -> "Packing":
        """`lengths_R`: int64 (R,), the number of real tokens of each row, 0 to `num_positions`."""
        mask_RT = torch.arange(num_positions, device=lengths_R.device)[None] < lengths_R[:, None]
        return cls(mask_RT.flatten().nonzero().squeeze(1), lengths_R.shape[0], num_positions)

    @classmethod
    def full(cls, num_rows: int, num_positions: int) -> "Packing":
        """Every position is a real token."""
        return cls(None, num_rows, num_positions)

    def pack(self, x: Tensor) -> Tensor:
        """(R, T, ...) -> (N, ...)"""
        return x.flatten(0, 1) if self.index_N is None else x.flatten(0, 1).index_select(0, self.index_N)

    def pad(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (R, T, D), zeros at padding."""
        if self.index_N is None:
            return x_ND.view(self.num_rows, self.num_positions, -1)
        x_XD = x_ND.new_zeros(self.num_rows * self.num_positions, x_ND.shape[1])
        return x_XD.index_copy(0, self.index_N, x_ND).view(self.num_rows, self.num_positions, -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(R, T, D) -> (R, H, T, K)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(R, H, T, K) -> (R, T, D)"""
    return x.transpose(1, 2).flatten(2)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Set a share of `x` to zero and scale up the rest (Srivastava et al. 2014).

    On a CPU one random 64-bit word serves eight elements, so the share is a multiple of 1/256. PyTorch's CPU dropout
    draws one word per element and took 19 % of a training step.
    """
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    threshold = round(probability * 256)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    keep = words.view(torch.uint8)[: x.numel()].view(x.shape) >= threshold
    return x * keep.to(x.dtype).mul_(256 / (256 - threshold))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout_probability: float = 0.0,
    fused: bool,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """Scaled dot-product attention of queries (R, H, T, K) to keys and values (R, H, S, K).

    Args:
        bias: added to the scores; broadcastable to (R, H, T, S); 0 for a visible key, minus infinity for a hidden one.
        is_causal: position t attends to positions 0 to t. Needs T = S and no bias.
        fused: use PyTorch's fused kernel; else two matrix products and a softmax.
        softmax_dtype: type of the softmax without the fused kernel. None is that of the products.
    """
    assert bias is None or not is_causal, "is_causal cannot be combined with a bias"
    bias = None if bias is None else bias.to(q.dtype)
    if fused:
        return F.scaled_dot_product_attention(q, k, v, bias, dropout_probability, is_causal)
    scores_RHTS = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        num_positions = q.shape[-2]
        scores_RHTS = scores_RHTS + torch.full((num_positions, num_positions), -torch.inf, dtype=q.dtype).triu_(1)
    if bias is not None:
        scores_RHTS = scores_RHTS + bias
    weights_RHTS = dropout(scores_RHTS.softmax(dim=-1, dtype=softmax_dtype), dropout_probability, training=True)
    return weights_RHTS.to(v.dtype) @ v


def mask_to_bias(mask: Tensor) -> Tensor:
    """The `bias` of `attention` in fp32, from a mask that is True for visible positions."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)


class HeadNorm(nn.Module):
    """RMSNorm over each head, with a learned scale. It bounds the attention scores of normalised queries and keys.

    QK-norm: Henry et al. 2020 (arXiv 2010.04245). RMSNorm: Zhang & Sennrich 2019 (arXiv 1910.07467). In bf16,
    PyTorch's RMSNorm took 1.5 times as long and needs weights in bf16.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K), computed in fp32 or above."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON) * self.weight).to(x.dtype)


@dataclass(frozen=True)
class LayerSettings:
    """Sizes and options of a layer."""

    width: int
    num_heads: int
    ffn_width: int
    memory_width: int | None
    """Width of the memory for cross-attention; None has no cross-attention."""
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_first: bool = True
    activation: Literal["relu", "gelu"] = "relu"
    """gelu is the tanh approximation."""
    qk_norm: bool = False
    """Normalise queries and keys per head."""
    zero_outputs: bool = False
    """Initialise the output projections to zero, so that a new layer is close to the identity."""
    fused_on_cpu: bool = True
    """Use PyTorch's fused attention on a CPU outside of training. With bf16 and one query it took up to six times as
    long as two products. In fp32 both took equally long."""


class DecoderLayer(nn.Module):
    """Causal self-attention, optional cross-attention to a memory, feed-forward."""

    def __init__(self, settings: LayerSettings) -> None:
        super().__init__()
        self.settings, self.num_heads = settings, settings.num_heads
        width, ffn_width = settings.width, settings.ffn_width
        # Keep this order. Checkpoints store the optimiser's state by the index of a weight.
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        outputs = [self.self_out]
        if settings.memory_width is not None:
            self.cross_q, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
            self.cross_kv = nn.Linear(settings.memory_width, 2 * width)
            outputs.append(self.cross_out)
        self.ffn_in, self.ffn_out = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)
        self.self_norm = nn.LayerNorm(width)
        if settings.memory_width is not None:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_q_norm, self.cross_k_norm = self._head_norm(), self._head_norm()
        self.ffn_norm = nn.LayerNorm(width)
        self.self_q_norm, self.self_k_norm = self._head_norm(), self._head_norm()
        if settings.zero_outputs:
            for layer in (*outputs, self.ffn_out):
                nn.init.zeros_(layer.weight)

    def _head_norm(self) -> nn.Module:
        return HeadNorm(self.settings.width // self.num_heads) if self.settings.qk_norm else nn.Identity()

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.settings.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, is_causal: bool = False) -> Tensor:
        # On a CPU the backward pass of PyTorch's fused kernel took 29 % of a training step; two products took 8 %.
        fused = q.device.type != "cpu" or (not self.training and self.settings.fused_on_cpu)
        probability = self.settings.attention_dropout if self.training else 0.0
        return attention(q, k, v, bias, is_causal=is_causal, dropout_probability=probability, fused=fused)

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.ffn_in(x)
        hidden = F.relu(hidden) if self.settings.activation == "relu" else F.gelu(hidden, approximate="tanh")
        return self.ffn_out(self._drop(hidden))

    def memory_kv(self, memory_BLM: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a memory: two tensors (B, H, L, K)."""
        key_BLD, value_BLD = self.cross_kv(memory_BLM).chunk(2, dim=-1)
        return self.cross_k_norm(split_heads(key_BLD, self.num_heads)), split_heads(value_BLD, self.num_heads)

    def _residual(self, x: Tensor, norm: nn.LayerNorm, change: Callable[[Tensor], Tensor]) -> Tensor:
        if self.settings.norm_first:
            return x + self._drop(change(norm(x)))
        return norm(x + self._drop(change(x)))

    def forward(
        self,
        x_ND: Tensor,
        packing: Packing,
        memory: Tensor | tuple[Tensor, Tensor] | None = None,
        *,
        bias: Tensor | None = None,
        memory_bias: Tensor | None = None,
        cache: "Cache | None" = None,
    ) -> Tensor:
        """Compute all positions at once, or with a cache the positions after the cached ones.

        Args:
            x_ND: packed tokens.
            packing: the positions of the tokens.
            memory: (B, L, M), or the keys and values from `memory_kv`.
            bias: of the self-attention, as in `attention`. None is causal; with a cache, None hides nothing.
            memory_bias: of the cross-attention, broadcastable to (B, H, C·T, L). None hides nothing.
            cache: stores the new keys and values.
        Returns: (N, D).
        """

        def self_attention(x_ND: Tensor) -> Tensor:
            qkv_RTX = packing.pad(self.self_qkv(x_ND))
            q, k, v = (split_heads(part, self.num_heads) for part in qkv_RTX.chunk(3, dim=-1))
            q, k = self.self_q_norm(q), self.self_k_norm(k)
            if cache is not None:
                k, v = cache.extended(k, v)
            # Padding is at the end of a row, so the causal mask hides it from the real tokens.
            mixed_RHTK = self._attend(q, k, v, bias, is_causal=bias is None and cache is None)
            return self.self_out(packing.pack(merge_heads(mixed_RHTK)))

        def cross_attention(x_ND: Tensor) -> Tensor:
            assert memory is not None
            key_BHLK, value_BHLK = self.memory_kv(memory) if isinstance(memory, Tensor) else memory
            q_RTD = packing.pad(self.cross_q(x_ND))
            # The C rows of an image become C·T queries that share one set of keys and values.
            q_BHXK = split_heads(q_RTD.reshape(len(key_BHLK), -1, q_RTD.shape[-1]), self.num_heads)
            mixed_BHXK = self._attend(self.cross_q_norm(q_BHXK), key_BHLK, value_BHLK, memory_bias)
            return self.cross_out(packing.pack(merge_heads(mixed_BHXK).reshape_as(q_RTD)))

        x_ND = self._residual(x_ND, self.self_norm, self_attention)
        if memory is not None:
            x_ND = self._residual(x_ND, self.cross_norm, cross_attention)
        return self._residual(x_ND, self.ffn_norm, self._feed_forward)


@dataclass
class Cache:
    """Keys and values of a layer, allocated once for the full length."""

    key_RHTK: Tensor
    value_RHTK: Tensor
    length: int = 0
    """Number of filled positions."""

    def extended(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (R, H, n, K). Returns all filled keys and values, (R, H, S, K)."""
        start, self.length = self.length, self.length + key.shape[2]
        assert self.length <= self.key_RHTK.shape[2], "more positions than the cache was allocated for"
        self.key_RHTK[:, :, start : self.length] = key
        self.value_RHTK[:, :, start : self.length] = value
        return self.key_RHTK[:, :, : self.length], self.value_RHTK[:, :, : self.length]


@dataclass
class DecodingState:
    """The state of incremental decoding. The methods re-order or drop rows and images."""

    caches: list[Cache]  # one per layer
    memory_kv: list[tuple[Tensor, Tensor] | None]  # one pair (B, H, L, K) per layer
    memory_bias: Tensor | None = None  # (B, 1, 1, L)

    @property
    def position(self) -> int:
        """Position of the next token."""
        return self.caches[0].length

    def select_rows(self, rows_R: Tensor) -> None:
        """Keep the rows `rows_R` of the caches, in that order."""
        self.caches = [Cache(each.key_RHTK[rows_R], each.value_RHTK[rows_R], each.length) for each in self.caches]

    def select_images(self, images_B: Tensor) -> None:
        """Keep the images `images_B`, in that order."""
        self.memory_kv = [None if kv is None else (kv[0][images_B], kv[1][images_B]) for kv in self.memory_kv]
        self.memory_bias = None if self.memory_bias is None else self.memory_bias[images_B]


class DecoderLayers(nn.ModuleList):
    """A stack of layers. The final norm belongs to the model."""

    def __init__(self, settings: LayerSettings, num_layers: int) -> None:
        super().__init__(DecoderLayer(settings) for _ in range(num_layers))
        self.settings = settings

    def layers(self) -> list[DecoderLayer]:
        return [layer for layer in self if isinstance(layer, DecoderLayer)]

    def forward(
        self,
        x_ND: Tensor,
        packing: Packing,
        memory_BLM: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        memory_bias: Tensor | None = None,
    ) -> Tensor:
        """All positions at once: packed tokens (N, D) -> (N, D). Other arguments as in `DecoderLayer.forward`."""
        for layer in self:
            x_ND = layer(x_ND, packing, memory_BLM, bias=bias, memory_bias=memory_bias)
        return x_ND

    def start(
        self,
        num_rows: int,
        num_positions: int,
        memory_BLM: Tensor | None = None,
        memory_bias: Tensor | None = None,
    ) -> DecodingState:
        """Empty caches for `num_rows` = B·C rows and `num_positions` positions. The C rows of an image are adjacent."""
        weight = self.layers()[0].self_qkv.weight
        shape = (num_rows, self.settings.num_heads, num_positions, self.settings.width // self.settings.num_heads)
        device = weight.device
        dtype = weight.dtype
        if torch.is_autocast_enabled(device.type):
            # The type of the layers' outputs. A cache of another type would be cast as a whole in every step.
            dtype = torch.get_autocast_dtype(device.type)
        empty = functools.partial(torch.zeros, shape, dtype=dtype, device=device)
        return DecodingState(
            [Cache(empty(), empty()) for _ in self],
            [None if memory_BLM is None else layer.memory_kv(memory_BLM) for layer in self.layers()],
            memory_bias,
        )

    def step(self, x_RTD: Tensor, state: DecodingState, bias: Tensor | None = None) -> Tensor:
        """Compute the next T positions of every row and add them to `state`: (R, T, D) -> (R, T, D).

        `bias` as in `DecoderLayer.forward`. Its S key positions end with the new ones.
        """
        packing = Packing.full(*x_RTD.shape[:2])
        x_ND = packing.pack(x_RTD)
        for layer, cache, memory_kv in zip(self, state.caches, state.memory_kv, strict=True):
            x_ND = layer(x_ND, packing, memory_kv, bias=bias, memory_bias=state.memory_bias, cache=cache)
        return packing.pad(x_ND)
