"""Writes captions with a frozen language model, behind a prompt and image tokens.

The prompt's keys and values are computed once for all images. A Llama on a CPU is computed by `mmcore.frozen.llama`,
other models by transformers.

Shapes: B images, C rows (beams) per image, R = B·C rows, T positions, Q image tokens, J words so far, W width of the
model, V tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmcore.frozen.language import FrozenLanguageModel
from mmcore.frozen.llama import Llama


@dataclass
class _CachedRows:
    """Keys and values of R rows that transformers keeps."""

    cache: Any
    num_positions: int = 0

    def select_rows(self, rows_R: Tensor) -> None:
        self.cache.batch_select_indices(rows_R)

    def select_images(self, images_B: Tensor) -> None:
        """Nothing is kept by image."""


class ByTransformers:
    """Reads images and words by the model of transformers. The methods are those of `Llama`."""

    def __init__(self, model: FrozenLanguageModel) -> None:
        self.model = model

    def _next(self, embeddings_RTW: Tensor, state: _CachedRows) -> Tensor:
        """Logits (R, V) after the last of T positions."""
        first, state.num_positions = state.num_positions, state.num_positions + embeddings_RTW.shape[1]
        positions_T = torch.arange(first, state.num_positions, device=embeddings_RTW.device)
        positions_RT = positions_T.expand(len(embeddings_RTW), -1)
        return self.model(embeddings_RTW, positions_RT, cache=state.cache)[:, -1].float()

    def read_images(
        self, prefix_PW: Tensor, image_BQW: Tensor, rows_per_image: int, num_words: int
    ) -> tuple[_CachedRows, Tensor]:
        from transformers import DynamicCache

        state = _CachedRows(DynamicCache(config=self.model.model.config))
        self._next(prefix_PW[None], state)
        state.cache.batch_repeat_interleave(len(image_BQW))
        first_BV = self._next(image_BQW, state)
        if rows_per_image > 1:
            state.cache.batch_repeat_interleave(rows_per_image)
        return state, first_BV

    def read_words(self, words_RW: Tensor, state: _CachedRows) -> Tensor:
        return self._next(words_RW[:, None], state)


@dataclass
class WritingState:
    """What is kept of unfinished captions."""

    rows: Any
    """Keys and values of R rows."""
    words_RJ: Tensor
    """The words of each caption."""
    first_RV: Tensor | None
    """Logits of the first token, computed with the image; None after the first step."""

    def select_rows(self, rows_R: Tensor) -> None:
        self.rows.select_rows(rows_R)
        self.words_RJ = self.words_RJ[rows_R]

    def select_images(self, images_B: Tensor) -> None:
        self.rows.select_images(images_B)


class CaptionWriter:
    """Writes captions behind one prefix. It is a decoder for `mmcore.captioners.decoding`, whose memory is (B, Q, W).

    The repetition penalty is that of CTRL (Keskar et al. 2019, arXiv 1909.05858, equation 1) as transformers has it:
    logits of counted tokens are divided by it if positive, else multiplied. The tokens of the caption are counted, once
    each. Those of the prompt are not: the report calls ``generate(inputs_embeds=...)``, which does not know them.
    """

    def __init__(self, model: FrozenLanguageModel, prefix_ids: Sequence[int], repetition_penalty: float = 1.0) -> None:
        self.model, self.prefix_ids, self.repetition_penalty = model, prefix_ids, repetition_penalty
        embeddings = model.model.get_input_embeddings().weight
        self.device, num_tokens = embeddings.device, model.model.config.get_text_config().vocab_size
        ids = model.tokenizer.token_ids
        self.end_id, self.other_ends = ids.eos_id, [index for index in model.end_ids if index != ids.eos_id]
        # A model may have more rows than its tokenizer has tokens.
        silent = sorted({*ids.silent_ids, *self.other_ends, *range(ids.size, num_tokens)})
        closing_V = torch.zeros(num_tokens, dtype=torch.bool)
        closing_V[model.tokenizer.sentence_end_ids()] = True
        self.silent, self.closing_V = torch.tensor(silent, device=self.device), closing_V.to(self.device)
        self.reader = Llama(model.model) if Llama.computes(model.model) else ByTransformers(model)

    def start(self, image_BQW: Tensor, rows_per_image: int, num_positions: int) -> WritingState:
        """Read the prompt once and the image tokens (B, Q, W) of each image."""
        prefix_PW = self.model.embed(self.prefix_ids)
        rows, first_BV = self.reader.read_images(prefix_PW, image_BQW, rows_per_image, num_positions)
        first_RV = first_BV.repeat_interleave(rows_per_image, dim=0)
        return WritingState(rows, torch.zeros(len(first_RV), 0, dtype=torch.long, device=self.device), first_RV)

    def step(self, ids_R: Tensor, state: WritingState) -> Tensor:
        """Logits (R, V) of the token after `ids_R`, which the first step ignores. A closed sentence ends."""
        if state.first_RV is not None:
            logits_RV, state.first_RV, closed_R = state.first_RV, None, None
        else:
            state.words_RJ = torch.cat([state.words_RJ, ids_R[:, None]], dim=1)
            logits_RV, closed_R = self.reader.read_words(self.model.embed(ids_R), state.rows), self.closing_V[ids_R]
        if self.repetition_penalty != 1:
            penalty, written_RJ = self.repetition_penalty, logits_RV.gather(1, state.words_RJ)
            lower_RJ = torch.where(written_RJ < 0, written_RJ * penalty, written_RJ / penalty)
            logits_RV = logits_RV.scatter(1, state.words_RJ, lower_RJ)
        # The end tokens of the model count as a line break: the most probable of them stands for all.
        end_R = logits_RV[:, [self.end_id, *self.other_ends]].amax(dim=1)
        logits_RV = logits_RV.index_fill(1, self.silent, -torch.inf)
        logits_RV[:, self.end_id] = end_R
        if closed_R is not None and closed_R.any():
            logits_RV[closed_R] = -torch.inf
            logits_RV[closed_R, self.end_id] = 0.0
        return logits_RV
