"""The Transformer decoder of the captioners (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

Training works on packed tokens: every linear layer and the loss see the real tokens of the batch only, and
attention alone sees the padded layout. The captions of one image share its keys and values.

Shapes: B images, C captions (or beams) an image, T positions, N real tokens of the batch, L image tokens,
D width, H heads, K = D / H width of a head, V words.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Packing:
    """Which positions of (B·C, T) are real tokens."""

    index_N: Tensor  # place of each real token in the flattened (B·C·T)
    num_rows: int
    num_positions: int

    @classmethod
    def from_lengths(cls, lengths_R: Tensor, num_positions: int) -> "Packing":
        """`lengths_R`: int64 (R,), the number of real tokens of each row, 0 to `num_positions`."""
        mask_RT = torch.arange(num_positions, device=lengths_R.device)[None] < lengths_R[:, None]
        return cls(mask_RT.flatten().nonzero().squeeze(1), lengths_R.shape[0], num_positions)

    def pack(self, x: Tensor) -> Tensor:
        """(R, T, ...) -> (N, ...)"""
        return x.flatten(0, 1).index_select(0, self.index_N)

    def pad(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (R, T, D), zeros where there is no token."""
        x_XD = x_ND.new_zeros(self.num_rows * self.num_positions, x_ND.shape[1])
        return x_XD.index_copy(0, self.index_N, x_ND).view(self.num_rows, self.num_positions, -1)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(R, T, D) -> (R, H, T, K)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(R, H, T, K) -> (R, T, D)"""
    return x.transpose(1, 2).flatten(2)


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Sine and cosine position codes (Vaswani et al. 2017, section 3.5): (T, D)."""
    position_T1 = torch.arange(num_positions, dtype=torch.float64)[:, None]
    frequency_F = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    codes_TD = torch.zeros(num_positions, width, dtype=torch.float64)
    codes_TD[:, 0::2] = torch.sin(position_T1 * frequency_F)
    codes_TD[:, 1::2] = torch.cos(position_T1 * frequency_F)
    return codes_TD.float()


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero a share of `x` and scale up the rest (Srivastava et al. 2014).

    PyTorch's CPU dropout draws one word of its serial generator an element and took 19 % of a training step;
    here one 64-bit word decides eight elements, so the share is a multiple of 1/256.
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
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool, dropout_probability: float, training: bool
) -> Tensor:
    """Scaled dot-product attention, all of (R, H, T, K) with k and v of another length where not causal.

    Training on a CPU takes the products one by one: the backward pass of PyTorch's fused kernel was 29 % of a
    step, against 8 % so. Everything else takes the fused kernel.
    """
    if not training or q.device.type != "cpu":
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, dropout_p=dropout_probability if training else 0.0
        )
    scores_RHTS = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if is_causal:
        num_positions = q.shape[-2]
        scores_RHTS = scores_RHTS + torch.full((num_positions, num_positions), -torch.inf, dtype=q.dtype).triu_(1)
    weights_RHTS = dropout(scores_RHTS.softmax(dim=-1), dropout_probability, training)
    return weights_RHTS.to(v.dtype) @ v


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to the image tokens, feed-forward."""

    def __init__(
        self, width: int, num_heads: int, ffn_width: int, dropout: float, attention_dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.norm_first = num_heads, norm_first
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.ffn_in, self.ffn_out = nn.Linear(width, ffn_width), nn.Linear(ffn_width, width)
        self.self_norm, self.cross_norm, self.ffn_norm = (nn.LayerNorm(width) for _ in range(3))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

    def _feed_forward(self, x: Tensor) -> Tensor:
        # The report's layers use ReLU; GELU made no measurable difference here.
        return self.ffn_out(self._drop(F.relu(self.ffn_in(x))))

    def memory_kv(self, memory_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the image tokens: two of (B, H, L, K)."""
        key_BLD, value_BLD = self.cross_kv(memory_BLD).chunk(2, dim=-1)
        return split_heads(key_BLD, self.num_heads), split_heads(value_BLD, self.num_heads)

    def _residual(self, x: Tensor, norm: nn.LayerNorm, attend) -> Tensor:
        if self.norm_first:
            return x + self._drop(attend(norm(x)))
        return norm(x + self._drop(attend(x)))

    def forward(self, x_ND: Tensor, packing: Packing, memory_BLD: Tensor) -> Tensor:
        """All positions at once, on packed tokens."""
        num_images = memory_BLD.shape[0]
        attend = functools.partial(attention, dropout_probability=self.attention_dropout, training=self.training)

        def self_attention(x_ND: Tensor) -> Tensor:
            qkv_RTX = packing.pad(self.self_qkv(x_ND))
            q, k, v = (split_heads(part, self.num_heads) for part in qkv_RTX.chunk(3, dim=-1))
            # Real tokens come first in their row, so the causal mask alone keeps padding out.
            mixed_RHTK = attend(q, k, v, is_causal=True)
            return self.self_out(packing.pack(merge_heads(mixed_RHTK)))

        def cross_attention(x_ND: Tensor) -> Tensor:
            q_RTD = packing.pad(self.cross_q(x_ND))
            # The C captions of an image are C·T queries on one set of keys and values.
            q_BHXK = split_heads(q_RTD.reshape(num_images, -1, q_RTD.shape[-1]), self.num_heads)
            mixed_BHXK = attend(q_BHXK, *self.memory_kv(memory_BLD), is_causal=False)
            return self.cross_out(packing.pack(merge_heads(mixed_BHXK).reshape_as(q_RTD)))

        x_ND = self._residual(x_ND, self.self_norm, self_attention)
        x_ND = self._residual(x_ND, self.cross_norm, cross_attention)
        return self._residual(x_ND, self.ffn_norm, self._feed_forward)

    def step(
        self, x_RD: Tensor, cache: tuple[Tensor, Tensor], memory_kv: tuple[Tensor, Tensor], position: int
    ) -> Tensor:
        """One more position of R = B·C rows; writes its key and value into `cache`, two of (R, H, T, K)."""
        num_images = memory_kv[0].shape[0]

        def self_attention(x_RD: Tensor) -> Tensor:
            q, k, v = (split_heads(part, self.num_heads) for part in self.self_qkv(x_RD[:, None]).chunk(3, dim=-1))
            cache[0][:, :, position] = k[:, :, 0]
            cache[1][:, :, position] = v[:, :, 0]
            mixed = F.scaled_dot_product_attention(q, cache[0][:, :, : position + 1], cache[1][:, :, : position + 1])
            return self.self_out(merge_heads(mixed)[:, 0])

        def cross_attention(x_RD: Tensor) -> Tensor:
            q_BHCK = split_heads(self.cross_q(x_RD).view(num_images, -1, x_RD.shape[-1]), self.num_heads)
            mixed_BHCK = F.scaled_dot_product_attention(q_BHCK, *memory_kv)
            return self.cross_out(merge_heads(mixed_BHCK).flatten(0, 1))

        x_RD = self._residual(x_RD, self.self_norm, self_attention)
        x_RD = self._residual(x_RD, self.cross_norm, cross_attention)
        return self._residual(x_RD, self.ffn_norm, self._feed_forward)


@dataclass
class DecodingState:
    """What incremental decoding remembers; `select` re-orders or drops rows."""

    caches: list[tuple[Tensor, Tensor]]  # per layer two of (R, H, T, K)
    memory_kv: list[tuple[Tensor, Tensor]]  # per layer two of (B, H, L, K)
    position: int = 0

    def select_rows(self, rows_R: Tensor) -> None:
        """Keep the rows `rows_R` of the caches, in that order."""
        self.caches = [(key[rows_R], value[rows_R]) for key, value in self.caches]

    def select_images(self, images_B: Tensor) -> None:
        """Keep the images `images_B`, in that order."""
        self.memory_kv = [(key[images_B], value[images_B]) for key, value in self.memory_kv]


class CaptionDecoder(nn.Module):
    """Words so far and image tokens -> logits of the next word."""

    def __init__(
        self,
        *,
        vocabulary_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        ffn_width: int,
        dropout: float,
        attention_dropout: float,
        max_length: int,
        norm_first: bool,
        tie_embeddings: bool,
    ) -> None:
        super().__init__()
        self.width, self.num_heads, self.max_length, self.dropout = width, num_heads, max_length, dropout
        self.embedding = nn.Embedding(vocabulary_size, width)
        self.positions_TD: Tensor
        self.register_buffer("positions_TD", sinusoidal_positions(max_length, width), persistent=False)
        self.layers = nn.ModuleList(
            DecoderLayer(width, num_heads, ffn_width, dropout, attention_dropout, norm_first) for _ in range(num_layers)
        )
        # Pre-norm leaves the residual stream unnormalised at the end; post-norm has just normalised it.
        self.final_norm = nn.LayerNorm(width) if norm_first else nn.Identity()
        self.output = nn.Linear(width, vocabulary_size)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if tie_embeddings:
            self.output.weight = self.embedding.weight

    def _decoder_layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]

    def _embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        # sqrt(D) brings the embeddings (std 1/sqrt(D)) to the scale of the position codes.
        x = self.embedding(input_ids) * math.sqrt(self.width) + positions
        return dropout(x, self.dropout, self.training)

    def forward(self, input_ids_RT: Tensor, packing: Packing, memory_BLD: Tensor) -> Tensor:
        """Logits of the word after each real token.

        Args:
            input_ids_RT: int64 (B·C, T), rows of one image together, begun by ``<bos>``.
            packing: which of them are real.
            memory_BLD: (B, L, D).
        Returns: (N, V).
        """
        positions_RTD = self.positions_TD[: input_ids_RT.shape[1]].expand(input_ids_RT.shape[0], -1, -1)
        x_ND = self._embed(packing.pack(input_ids_RT[..., None]).squeeze(-1), packing.pack(positions_RTD))
        for layer in self.layers:
            x_ND = layer(x_ND, packing, memory_BLD)
        return self.output(self.final_norm(x_ND))

    def start(self, memory_BLD: Tensor, rows_per_image: int, num_positions: int) -> DecodingState:
        """Empty caches for `rows_per_image` rows an image and at most `num_positions` words."""
        num_rows = memory_BLD.shape[0] * rows_per_image
        shape = (num_rows, self.num_heads, num_positions, self.width // self.num_heads)
        return DecodingState(
            caches=[(memory_BLD.new_zeros(shape), memory_BLD.new_zeros(shape)) for _ in self._decoder_layers()],
            memory_kv=[layer.memory_kv(memory_BLD) for layer in self._decoder_layers()],
        )

    def step(self, input_ids_R: Tensor, state: DecodingState) -> Tensor:
        """Logits (R, V) of the word after `input_ids_R`, which stands at ``state.position``."""
        x_RD = self._embed(input_ids_R, self.positions_TD[state.position])
        for layer, cache, memory_kv in zip(self._decoder_layers(), state.caches, state.memory_kv, strict=True):
            x_RD = layer.step(x_RD, cache, memory_kv, state.position)
        state.position += 1
        return self.output(self.final_norm(x_RD))
