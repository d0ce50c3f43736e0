"""The layers of a Q-Former (Li et al. 2023, arXiv 2301.12597); `mmcore.captioners.qformer` has the model.

Linear layers compute real tokens only, and attention uses the padded layout, as in `mmcore.decoder`.

Shapes: B images, C captions (or beams) per image, R = B·C rows, Q queries, T query positions, S key positions, N real
tokens of the batch, L image tokens, E channels of an image token, D width, H heads, K = D / H width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.decoder import Cache, Packing, attention, dropout, merge_heads, split_heads
from mmcore.errors import check_at_least_one, check_heads, check_share

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of an attention, split into heads."""


@dataclass(frozen=True)
class QFormerSettings:
    """Sizes of a Q-Former. The defaults are those of BLIP-2."""

    vocabulary_size: int | None = 30_523
    """Number of words (V): those of `bert-base-uncased` and `[DEC]`. None has no text half, only queries."""
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    num_queries: int = 32
    memory_width: int = 1408
    """Channels of an image token (E)."""
    cross_every: int = 2
    """Every so many layers attend to the image, from layer 0 on."""
    max_positions: int = 512
    """Longest text in tokens."""
    dropout: float = 0.1
    attention_dropout: float = 0.1
    norm_epsilon: float = 1e-12

    def __post_init__(self) -> None:
        """Raises InputError for sizes that do not go together."""
        sizes = ("width", "num_layers", "num_heads", "ffn_width", "num_queries", "memory_width", "cross_every")
        check_at_least_one(self, *sizes, "max_positions")
        check_share(self, "dropout", "attention_dropout")
        check_heads(self)


@dataclass
class Tokens:
    """Queries or words: the packed hidden states, and their positions."""

    x_ND: Tensor
    packing: Packing

    def padded(self) -> Tensor:
        return self.packing.pad(self.x_ND)


def attention_after(
    q_RHTK: Tensor,
    own: KeyValue,
    past: KeyValue,
    bias: Tensor | None = None,
    *,
    dropout_probability: float = 0.0,
) -> Tensor:
    """Attention of rows to their own positions and, before these, to positions that the rows of an image share.

    The shared keys and values are not copied for each row.

    Args:
        q_RHTK: (R, H, T, K); the C rows of an image are adjacent.
        own: keys and values (R, H, S, K) of each row.
        past: keys and values (B, H, Q, K) of each image.
        bias: added to the scores of `own`; broadcastable to (R, H, T, S), as in `mmcore.decoder.attention`.
    Returns: (R, H, T, K).
    """
    num_images, num_past, num_positions = past[0].shape[0], past[0].shape[2], q_RHTK.shape[2]

    def by_image(x: Tensor) -> Tensor:  # (R, H, T, X) -> (B, H, C·T, X)
        return x.unflatten(0, (num_images, -1)).transpose(1, 2).flatten(2, 3)

    def by_row(x: Tensor) -> Tensor:  # (B, H, C·T, X) -> (R, H, T, X)
        return x.unflatten(2, (-1, num_positions)).transpose(1, 2).flatten(0, 1)

    q_RHTK = q_RHTK * q_RHTK.shape[-1] ** -0.5
    to_own_RHTS = q_RHTK @ own[0].transpose(-2, -1)
    if bias is not None:
        to_own_RHTS = to_own_RHTS + bias.to(q_RHTK.dtype)
    to_past_RHTQ = by_row(by_image(q_RHTK) @ past[0].transpose(-2, -1))
    scores = torch.cat([to_past_RHTQ, to_own_RHTS], -1)
    weights = dropout(scores.softmax(-1, dtype=_softmax_dtype(scores)), dropout_probability, training=True)
    weights = weights.to(own[1].dtype)
    return by_row(by_image(weights[..., :num_past]) @ past[1]) + weights[..., num_past:] @ own[1]


def _softmax_dtype(scores: Tensor) -> torch.dtype:
    """fp32 or above. The weights of a softmax in bf16 would add up to 1 within 1 % only."""
    return torch.promote_types(scores.dtype, torch.float32)


class _Attention(nn.Module):
    """Attention with a residual connection and post-norm. `key_width`: channels of what is attended to."""

    def __init__(self, settings: QFormerSettings, key_width: int) -> None:
        super().__init__()
        width = settings.width
        self.settings = settings
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(key_width, width), nn.Linear(key_width, width)
        self.norm = nn.LayerNorm(width, settings.norm_epsilon)

    def heads(self, x_ND: Tensor, packing: Packing, layer: nn.Linear) -> Tensor:
        """(N, D) -> (R, H, T, K) through the query, key or value `layer`; zeros at padding."""
        return split_heads(packing.pad(layer(x_ND)), self.settings.num_heads)

    def memory_kv(self, memory_BLE: Tensor) -> KeyValue:
        """(B, L, E) -> two tensors (B, H, L, K)."""
        key_BHLK, value_BHLK = (
            split_heads(layer(memory_BLE), self.settings.num_heads) for layer in (self.key, self.value)
        )
        return key_BHLK, value_BHLK

    def attend(self, q: Tensor, kv: KeyValue, *, bias: Tensor | None = None, past: KeyValue | None = None) -> Tensor:
        """`mmcore.decoder.attention`, or `attention_after` with a `past`."""
        probability = self.settings.attention_dropout if self.training else 0.0
        if past is not None:
            return attention_after(q, kv, past, bias, dropout_probability=probability)
        # On a CPU two products are faster in training, as in `mmcore.decoder.DecoderLayer`.
        fused = q.device.type != "cpu" or not self.training
        return attention(q, *kv, bias, dropout_probability=probability, fused=fused, softmax_dtype=_softmax_dtype(q))

    def add(self, tokens: Tokens, mixed_RHTK: Tensor) -> Tokens:
        """The tokens after the attention whose result is `mixed_RHTK`."""
        change_ND = self.out(tokens.packing.pack(merge_heads(mixed_RHTK)))
        change_ND = dropout(change_ND, self.settings.dropout, self.training)
        return Tokens(self.norm(tokens.x_ND + change_ND), tokens.packing)


class _FeedForward(nn.Module):
    """Two linear layers with an exact GELU between them, a residual connection and post-norm."""

    def __init__(self, settings: QFormerSettings) -> None:
        super().__init__()
        self.dropout = settings.dropout
        self.inner = nn.Linear(settings.width, settings.ffn_width)
        self.out = nn.Linear(settings.ffn_width, settings.width)
        self.norm = nn.LayerNorm(settings.width, settings.norm_epsilon)

    def forward(self, tokens: Tokens) -> Tokens:
        change_ND = dropout(self.out(F.gelu(self.inner(tokens.x_ND))), self.dropout, self.training)
        return Tokens(self.norm(tokens.x_ND + change_ND), tokens.packing)


class QFormerLayer(nn.Module):
    """Self-attention of queries and text, cross-attention of the queries in some layers, feed-forward."""

    def __init__(self, settings: QFormerSettings, index: int) -> None:
        super().__init__()
        self.self_attention = _Attention(settings, settings.width)
        has_cross_attention = index % settings.cross_every == 0
        self.cross_attention = _Attention(settings, settings.memory_width) if has_cross_attention else None
        self.query_ffn = _FeedForward(settings)
        self.text_ffn = None if settings.vocabulary_size is None else _FeedForward(settings)

    def forward(
        self,
        queries: Tokens | None,
        text: Tokens | None,
        *,
        memory: Tensor | KeyValue | None = None,
        bias: Tensor | None = None,
        past: KeyValue | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tokens | None, Tokens | None, KeyValue]:
        """Queries, text, or queries followed by text.

        Args:
            memory: image features (B, L, E), or their `memory_kv`; needed with queries in a layer of cross-attention.
            bias: of the self-attention, as in `mmcore.decoder.attention`. None hides nothing.
            past: keys and values (B, H, Q, K) of queries that come before the text.
            cache: stores the new keys and values, and provides the earlier ones.
        Returns: queries, text, and the keys and values of the self-attention (R, H, S, K).
        """
        given = [tokens for tokens in (queries, text) if tokens is not None]
        attends = self.self_attention
        q, k, v = (
            torch.cat([attends.heads(tokens.x_ND, tokens.packing, layer) for tokens in given], dim=2)
            for layer in (attends.query, attends.key, attends.value)
        )
        if cache is not None:
            k, v = cache.extended(k, v)
        mixed = attends.attend(q, (k, v), bias=bias, past=past)
        parts = list(mixed.split([tokens.packing.num_positions for tokens in given], dim=2))
        if queries is not None:
            queries = attends.add(queries, parts.pop(0))
            if (cross := self.cross_attention) is not None:
                assert memory is not None, "queries need image features"
                kv = cross.memory_kv(memory) if isinstance(memory, Tensor) else memory
                q_BHQK = cross.heads(queries.x_ND, queries.packing, cross.query)
                queries = cross.add(queries, cross.attend(q_BHQK, kv))
            queries = self.query_ffn(queries)
        if text is not None:
            assert self.text_ffn is not None, "this Q-Former has no text half"
            text = self.text_ffn(attends.add(text, parts.pop(0)))
        return queries, text, (k, v)
