"""The Q-Former of BLIP-2: learned queries that read frozen image features (Li et al. 2023, arXiv 2301.12597).

It is a BERT (Devlin et al. 2019, arXiv 1810.04805): post-norm, exact GELU, and no token types. Queries and text share
the self-attention of a layer and have a feed-forward layer each. In every `cross_every`-th layer, from layer 0 on, the
queries also attend to the image. Three masks (BLIP-2, figure 2) make three tasks of one set of weights. A row is a
position that attends, a column one that is attended to; q is a query, t a word:

          ITC: apart           ITM: all to all        ITG: causal text after the queries
           q q t t              q q t t                q q t t
        q  # # . .           q  # # # #             q  # # . .
        q  # # . .           q  # # # #             q  # # . .
        t  . . # #           t  # # # #             t  # # # .
        t  . . # #           t  # # # #             t  # # # #

ITC (image-text contrast) needs `QFormer.queries` and `QFormer.text`. ITM (matching) needs `QFormer.multimodal`. ITG
(generation) needs `QFormer.queries` and then `QFormer.causal`. Queries never see the words of ITG. So their keys and
values are computed once for all captions of an image, in training and in decoding.

The queries start as N(0, 0.02). Equal queries would stay equal, as nothing else tells one query from another.

The precision is that of the weights, fp32. Under autocast to bf16, linear layers and the products of attention are in
bf16. Hidden states, LayerNorm, softmax, and the features and logits of `MatchingHeads` stay in fp32. Under autocast to
fp16 all is fp32: there the loss became infinite (LAVIS issue 267). The largest number of fp16 is 65,504; that of bf16
is as large as that of fp32.

Shapes: B images, C captions (or beams) per image, R = B·C rows, Q queries, T positions of text, S key positions, N real
tokens of the batch, L image tokens, E channels of an image token, D width, H heads, K = D / H width of a head, V words,
F channels of an image or text feature.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcore.captioners.qformer_layers import KeyValue, QFormerLayer, QFormerSettings, Tokens
from mmcore.decoder import Cache, DecodingState, Packing, dropout, mask_to_bias

# Standard deviation of the queries, and of BERT's initial weights at its width.
_INITIAL_STD, _BERT_WIDTH = 0.02, 768

P = ParamSpec("P")
Result = TypeVar("Result")


@dataclass
class QueryState:
    """The queries of images after all layers."""

    hidden_BQD: Tensor
    kv: list[KeyValue]
    """One pair (B, H, Q, K) per layer: keys and values of the queries in self-attention."""


@dataclass
class MemoryKeys:
    """Keys and values of image features in cross-attention: None, or a pair (B, H, L, K), per layer."""

    kv: list[KeyValue | None]

    def of(self, images_R: Tensor) -> "MemoryKeys":
        """Those of the images with the indices `images_R`, int64 (R,). An image may occur more than once."""
        return MemoryKeys([None if kv is None else (kv[0][images_R], kv[1][images_R]) for kv in self.kv])

    def repeated(self, num_rows: int) -> "MemoryKeys":
        """Those of one image for `num_rows` texts, without a copy."""
        rows = (num_rows, -1, -1, -1)
        return MemoryKeys([None if kv is None else (kv[0].expand(rows), kv[1].expand(rows)) for kv in self.kv])


class _LanguageHead(nn.Module):
    """The hidden layer and the bias of BERT's output layer, whose weights are the word embeddings."""

    def __init__(self, settings: QFormerSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(settings.width, settings.width)
        self.norm = nn.LayerNorm(settings.width, settings.norm_epsilon)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, hidden: Tensor, words_VD: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        # Under autocast the layer gives bf16, and LayerNorm would compute in the type of its input.
        inner = self.dense(hidden).to(self.norm.weight.dtype)
        return F.linear(self.norm(F.gelu(inner)), words_VD, self.bias)


def _initialize(module: nn.Module, width: int) -> None:
    """BERT's initial weights (its code, not its paper): N(0, 0.02) at width 768, biases of 0.

    Narrower layers have larger weights, so that a layer changes its input as much as at width 768. With 0.02 at width
    32, ITM on 20 images was right for 0.87 of the pairs after 150 steps. With this rule all were right.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=_INITIAL_STD * math.sqrt(_BERT_WIDTH / width))
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def _without_fp16(method: Callable[Concatenate["QFormer", P], Result]) -> Callable[Concatenate["QFormer", P], Result]:
    """`method` under the autocast of its caller, unless that is to fp16."""

    @functools.wraps(method)
    def computed(self: "QFormer", /, *arguments: P.args, **keywords: P.kwargs) -> Result:
        device = self.query_tokens_QD.device.type
        in_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        with torch.autocast(device, torch.bfloat16, enabled=in_bf16):
            return method(self, *arguments, **keywords)

    return computed


class QFormer(nn.Module):
    """Learned queries and text over image features. `mmcore.captioners.decoding` searches with `start` and `step`."""

    def __init__(self, settings: QFormerSettings) -> None:
        super().__init__()
        self.settings = settings
        width, words = settings.width, settings.vocabulary_size
        self.query_tokens_QD = nn.Parameter(torch.empty(settings.num_queries, width))
        self.word_embeddings = None if words is None else nn.Embedding(words, width)
        self.position_embeddings = None if words is None else nn.Embedding(settings.max_positions, width)
        self.lm_head = None if words is None else _LanguageHead(settings, words)
        self.embedding_norm = nn.LayerNorm(width, settings.norm_epsilon)
        self.layers = nn.ModuleList(QFormerLayer(settings, index) for index in range(settings.num_layers))
        self.apply(functools.partial(_initialize, width=width))
        nn.init.normal_(self.query_tokens_QD, std=_INITIAL_STD)

    def blocks(self) -> list[nn.Module]:
        """Modules for activation checkpointing."""
        return list(self.layers)

    @_without_fp16
    def memory_keys(self, memory_BLE: Tensor) -> MemoryKeys:
        """Keys and values of image features (B, L, E).

        `queries` and `multimodal` take them in place of the features. Several passes over an image then share them.
        """
        memory_BLE = memory_BLE.to(self.query_tokens_QD.dtype)
        attentions = [layer.cross_attention for layer in self._layers()]
        return MemoryKeys([None if each is None else each.memory_kv(memory_BLE) for each in attentions])

    @_without_fp16
    def queries(self, memory: Tensor | MemoryKeys) -> QueryState:
        """The queries of each image. They attend to each other and to the image.

        `memory`: image features (B, L, E), or their `memory_keys`.
        """
        memories = self._memories(memory)
        queries = self._query_tokens(_num_images(memories[0]))
        keys_and_values = []
        for layer, memory_of_layer in zip(self._layers(), memories, strict=True):
            queries, _, kv = layer(queries, None, memory=memory_of_layer)
            keys_and_values.append(kv)
        return QueryState(queries.padded(), keys_and_values)

    @_without_fp16
    def text(self, input_ids_RT: Tensor, mask_RT: Tensor) -> Tensor:
        """Text alone, attending in both directions.

        Args:
            input_ids_RT: int64 (R, T).
            mask_RT: (R, T), True or 1 for real tokens. Padding is at the end of a row.
        Returns: (R, T, D), zeros at padding.
        """
        text, there_RT = self._text_tokens(input_ids_RT, _packing(mask_RT)), mask_RT.bool()
        # A row without any token attends to its padding: a softmax over nothing would be NaN.
        bias = mask_to_bias(there_RT | ~there_RT.any(dim=1, keepdim=True))[:, None, None]
        for layer in self._layers():
            _, text, _ = layer(None, text, bias=bias)
        return text.padded()

    @_without_fp16
    def multimodal(self, memory: Tensor | MemoryKeys, input_ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and text, all attending to all; the queries attend to the image too.

        Args:
            memory: image features (B, L, E), or their `memory_keys`.
            input_ids_BT: int64 (B, T), one text per image.
            mask_BT: (B, T), as in `text`.
        Returns: queries (B, Q, D), and text (B, T, D) with zeros at padding.
        """
        queries = self._query_tokens(len(input_ids_BT))
        text = self._text_tokens(input_ids_BT, _packing(mask_BT))
        there_BS = torch.cat([mask_BT.new_ones(len(mask_BT), self.settings.num_queries), mask_BT], dim=1).bool()
        bias = mask_to_bias(there_BS)[:, None, None]
        for layer, memory_of_layer in zip(self._layers(), self._memories(memory), strict=True):
            queries, text, _ = layer(queries, text, memory=memory_of_layer, bias=bias)
        return queries.padded(), text.padded()

    @_without_fp16
    def causal(self, input_ids_RT: Tensor, mask_RT: Tensor, state: QueryState) -> Tensor:
        """Causal text after the queries. The C rows of an image are adjacent and share its queries.

        Args:
            input_ids_RT: int64 (B·C, T).
            mask_RT: (B·C, T), as in `text`.
            state: from `queries`.
        Returns: (R, T, D), zeros at padding; `logits` makes the next word of it.
        """
        text, num_positions = self._text_tokens(input_ids_RT, _packing(mask_RT)), input_ids_RT.shape[1]
        # Padding is at the end of a row, so this mask hides it from the real tokens.
        bias = mask_to_bias(torch.ones(num_positions, num_positions, dtype=torch.bool, device=mask_RT.device).tril())
        for layer, past in zip(self._layers(), state.kv, strict=True):
            _, text, _ = layer(None, text, bias=bias, past=past)
        return text.padded()

    @_without_fp16
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., D) -> logits (..., V) of the next word."""
        assert self.lm_head is not None, "this Q-Former has no text half"
        assert self.word_embeddings is not None
        return self.lm_head(hidden.to(self.query_tokens_QD.dtype), self.word_embeddings.weight)

    def start(self, memory_BLE: Tensor, rows_per_image: int, num_positions: int) -> DecodingState:
        """Decoding from image features (B, L, E): `rows_per_image` rows per image, at most `num_positions` words."""
        return self.start_after(self.queries(memory_BLE), rows_per_image, num_positions)

    def start_after(self, state: QueryState, rows_per_image: int, num_positions: int) -> DecodingState:
        """As `start`, from the result of `queries`."""
        num_images, num_heads, _, head_width = state.kv[0][0].shape
        shape = (num_images * rows_per_image, num_heads, num_positions, head_width)
        # Of the keys' type. A cache of another type would be cast as a whole in every step.
        empty = [(key_BHQK.new_zeros(shape), value_BHQK.new_zeros(shape)) for key_BHQK, value_BHQK in state.kv]
        return DecodingState([Cache(key, value) for key, value in empty], list(state.kv))

    @_without_fp16
    def step(self, ids_R: Tensor, state: DecodingState) -> Tensor:
        """Logits (R, V) of the word after `ids_R`, int64 (R,). Adds the word to `state`."""
        text = self._text_tokens(ids_R[:, None], Packing.full(len(ids_R), 1), state.position)
        for layer, cache, past in zip(self._layers(), state.caches, state.memory_kv, strict=True):
            _, text, _ = layer(None, text, past=past, cache=cache)
        return self.logits(text.x_ND)

    def _layers(self) -> list[QFormerLayer]:
        return [layer for layer in self.layers if isinstance(layer, QFormerLayer)]

    def _memories(self, memory: Tensor | MemoryKeys) -> list[Tensor | KeyValue | None]:
        """What each layer attends to."""
        if isinstance(memory, MemoryKeys):
            return list(memory.kv)
        return [memory.to(self.query_tokens_QD.dtype)] * self.settings.num_layers

    def _query_tokens(self, num_images: int) -> Tokens:
        """The queries of each image before the first layer."""
        x_BQD = self.embedding_norm(self.query_tokens_QD).expand(num_images, -1, -1)
        packing = Packing.full(num_images, self.settings.num_queries)
        return Tokens(packing.pack(dropout(x_BQD, self.settings.dropout, self.training)), packing)

    def _text_tokens(self, input_ids_RT: Tensor, packing: Packing, first: int = 0) -> Tokens:
        """The words before the first layer; `first` is the position of the first word."""
        assert self.word_embeddings is not None, "this Q-Former has no text half"
        assert self.position_embeddings is not None
        num_positions = packing.num_positions
        assert first + num_positions <= self.settings.max_positions, (
            f"{first + num_positions} tokens, but this Q-Former has {self.settings.max_positions} positions"
        )
        places_RT = torch.arange(first, first + num_positions, device=input_ids_RT.device).expand_as(input_ids_RT)
        ids_N, places_N = (packing.pack(each[..., None]).squeeze(-1) for each in (input_ids_RT, places_RT))
        x_ND = self.embedding_norm(self.word_embeddings(ids_N) + self.position_embeddings(places_N))
        return Tokens(dropout(x_ND, self.settings.dropout, self.training), packing)


def _packing(mask_RT: Tensor) -> Packing:
    """The positions where the mask is not 0."""
    return Packing(mask_RT.flatten().nonzero().squeeze(1), *mask_RT.shape)


def _num_images(memory: Tensor | KeyValue | None) -> int:
    assert memory is not None, "layer 0 always attends to the image"
    return len(memory) if isinstance(memory, Tensor) else len(memory[0])


class MatchingHeads(nn.Module):
    """The layers with which BLIP-2 compares an image and a text: two projections, and a classifier of pairs.

    They are computed in the precision of the weights, also under autocast.
    """

    # For `mmcore.frozen_weights`: frozen weights stay in fp32 if the training is in bf16.
    own_precision = True

    def __init__(self, width: int, feature_width: int = 256) -> None:
        super().__init__()
        self.vision_projection, self.text_projection = nn.Linear(width, feature_width), nn.Linear(width, feature_width)
        self.itm_head = nn.Linear(width, 2)

    def image_features(self, queries_BQD: Tensor) -> Tensor:
        """Queries of `QFormer.queries` -> normalised features (B, Q, F).

        The similarity of an image and a text is the largest product over the queries.
        """
        return F.normalize(_outside_autocast(self.vision_projection, queries_BQD), dim=-1)

    def text_features(self, text_RTD: Tensor) -> Tensor:
        """Words of `QFormer.text` -> normalised features (R, F), of the first token."""
        return F.normalize(_outside_autocast(self.text_projection, text_RTD[:, 0]), dim=-1)

    def pair_logits(self, queries_BQD: Tensor) -> Tensor:
        """Queries of `QFormer.multimodal` -> logits of "no match" and "match" at each query, (B, Q, 2)."""
        return _outside_autocast(self.itm_head, queries_BQD)


def _outside_autocast(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return layer(x)
