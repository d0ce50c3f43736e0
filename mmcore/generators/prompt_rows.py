"""The captions of a dataset as inputs of a generator's network: token ids or cached hidden states.

Shapes: N rows of the dataset, K captions per image, B rows of a batch, T text tokens, E channels of a frozen text
encoder.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from mmcore.data.columns import Column
from mmcore.frozen.text import NO_TEXT, PromptTokenizer
from mmcore.rows import Batch


class Prompts(Protocol):
    """The captions of a dataset as inputs of a network."""

    def batch(self, rows: Sequence[int], captions: Sequence[int | None]) -> Batch:
        """The text inputs of `rows`, each with the caption of that index. None is the empty text."""


class PromptIds:
    """Captions as token ids, for a text encoder that is trained jointly."""

    def __init__(self, captions: Sequence[Sequence[str]], tokenizer: PromptTokenizer) -> None:
        """`captions`: the captions of each row, in the order of the dataset."""
        ids, _ = tokenizer([text for row in captions for text in row])
        self.ids_by_row = ids.split([len(row) for row in captions])
        self.null_T = tokenizer([NO_TEXT])[0][0]

    def batch(self, rows: Sequence[int], captions: Sequence[int | None]) -> Batch:
        """`input_ids` int64 (B, T)."""
        pairs = zip(rows, captions, strict=True)
        ids = [self.null_T if caption is None else self.ids_by_row[row][caption] for row, caption in pairs]
        return {"input_ids": torch.stack(ids)}


class PromptEmbeddings:
    """Captions as the cached hidden states of a frozen text encoder."""

    def __init__(self, column: Column, null: np.ndarray, image_ids: Sequence[str]) -> None:
        """`column`: fp16 (N, K, T, E). `null`: hidden states of the empty text, (T, E). `image_ids`: of the dataset."""
        places = {image_id: place for place, image_id in enumerate(column.image_ids)}
        self.places = [places[image_id] for image_id in image_ids]
        self.values_NKTE, self.null_TE = column.values, null.astype(column.values.dtype)

    def batch(self, rows: Sequence[int], captions: Sequence[int | None]) -> Batch:
        """`encoder_hidden_states` fp16 (B, T, E)."""
        pairs = zip(rows, captions, strict=True)
        values = [
            self.null_TE if caption is None else self.values_NKTE[self.places[row], caption] for row, caption in pairs
        ]
        return {"encoder_hidden_states": torch.from_numpy(np.stack(values))}
