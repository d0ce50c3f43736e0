"""The reward of a caption: a smoothed BLEU of its own, over ids. `mmcore.metrics.bleu` has the BLEU of a corpus.

BLEU: Papineni et al. 2002. Smoothing: Lin & Och 2004 (ORANGE), one match more of one n-gram more for each n above 1.

Shapes: B images, C captions per image, T tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from mmcore.text import TokenIds

NUM_ORDERS = 4


class Ngrams:
    """A caption with its n-grams counted once."""

    def __init__(self, ids: Sequence[int]) -> None:
        """`ids`: without begin and end tokens."""
        self.length = len(ids)
        self.counts = [
            Counter(tuple(ids[start : start + order]) for start in range(len(ids) - order + 1))
            for order in range(1, NUM_ORDERS + 1)
        ]


def sentence_bleu(candidate: Ngrams, references: Sequence[Ngrams]) -> float:
    """BLEU-4 of a caption in [0, 1]; 0 without a word that a reference has.

    The brevity penalty takes the mean length of the references. With the length closest to the candidate's, as corpus
    BLEU has it, training shortened captions below the shortest reference (docs/log.md).
    """
    total = 0.0
    for order, counts in enumerate(candidate.counts):
        matches = sum(
            min(count, max(each.counts[order][ngram] for each in references)) for ngram, count in counts.items()
        )
        smoothing = 1 if order else 0
        if matches + smoothing == 0:
            return 0.0
        total += math.log((matches + smoothing) / (max(0, candidate.length - order) + smoothing))
    mean_length = sum(each.length for each in references) / len(references)
    return math.exp(total / NUM_ORDERS + min(0.0, 1 - mean_length / candidate.length))


def reference_ngrams(input_ids_BCT: Tensor, lengths_BC: Tensor, tokens: TokenIds) -> list[list[Ngrams]]:
    """The captions of each image that are there: int64 ids with begin and end, and lengths with 0 for missing ones."""
    return [
        [
            Ngrams([word for word in ids[1:length] if word != tokens.eos_id])
            for ids, length in zip(captions, lengths, strict=True)
            if length
        ]
        for captions, lengths in zip(input_ids_BCT.tolist(), lengths_BC.tolist(), strict=True)
    ]


def rewards(captions: Sequence[Sequence[Sequence[int]]], references: Sequence[Sequence[Ngrams]]) -> Tensor:
    """Reward of each caption of each image: fp32 (B, C)."""
    return torch.tensor(
        [[sentence_bleu(Ngrams(ids), own) for ids in each] for each, own in zip(captions, references, strict=True)]
    )


def padded(captions: Sequence[Sequence[Sequence[int]]], tokens: TokenIds, max_length: int) -> tuple[Tensor, Tensor]:
    """Captions as the model trains on them: at most `max_length` ids with begin and end (B, C, T), and lengths (B, C).

    A caption of `max_length` - 1 words was cut off, and has no end.
    """
    encoded = [[[tokens.bos_id, *ids, tokens.eos_id][:max_length] for ids in each] for each in captions]
    lengths_BC = torch.tensor([[len(ids) for ids in each] for each in encoded])
    ids_BCT = torch.zeros(*lengths_BC.shape, int(lengths_BC.max()), dtype=torch.long)
    for image, each in enumerate(encoded):
        for row, ids in enumerate(each):
            ids_BCT[image, row, : len(ids)] = torch.tensor(ids)
    return ids_BCT, lengths_BC
