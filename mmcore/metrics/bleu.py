"""Corpus BLEU as sums: what one shard counts adds up to what the whole corpus counts.

The numbers are those of nltk's ``corpus_bleu`` with ``SmoothingFunction().method1`` (Papineni et al. 2002;
Chen & Cherry 2014, smoothing 1). Every sentence is counted by nltk itself, so its conventions hold here
too: an order that a hypothesis is too short for adds 1, not 0, to the total of that order; the reference
length is the one closest to the hypothesis, the shorter of two; no matching word at all scores 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nltk.translate.bleu_score import (
    Fraction,
    SmoothingFunction,
    brevity_penalty,
    closest_ref_length,
    modified_precision,
)

# The report's weights; its BLEU-3 has 0.333, 0.333, 0.334, which differs from thirds in the fourth digit.
BLEU_WEIGHTS: dict[str, tuple[float, ...]] = {
    "bleu1": (1.0, 0.0, 0.0, 0.0),
    "bleu2": (0.5, 0.5, 0.0, 0.0),
    "bleu3": (0.333, 0.333, 0.334, 0.0),
    "bleu4": (0.25, 0.25, 0.25, 0.25),
}
NUM_ORDERS = 4


def tokenize(caption: str, *, lowercase: bool = False) -> list[str]:
    """The report's tokens: what stands between white space, case kept unless `lowercase`."""
    return (caption.lower() if lowercase else caption).split()


@dataclass(frozen=True)
class BleuCounts:
    """What BLEU needs to know of any number of captions; whole numbers, so that adding them is exact.

    Attributes:
        matches: for n-grams of 1..4 words, how many of the hypotheses' are in a reference (clipped).
        totals: for n-grams of 1..4 words, how many the hypotheses have (at least 1 for each hypothesis).
        hypothesis_length: words in the hypotheses.
        reference_length: words in the reference closest in length to each hypothesis.
    """

    matches: tuple[int, int, int, int] = (0, 0, 0, 0)
    totals: tuple[int, int, int, int] = (0, 0, 0, 0)
    hypothesis_length: int = 0
    reference_length: int = 0

    @classmethod
    def of(cls, hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> "BleuCounts":
        """The counts of one caption (a list of words) against its references (lists of words).

        Raises:
            ValueError: `references` is empty.
        """
        if not references:
            raise ValueError("BLEU needs at least one reference for each hypothesis, got 0")
        precisions = [modified_precision(references, hypothesis, order + 1) for order in range(NUM_ORDERS)]
        one, two, three, four = precisions
        return cls(
            matches=(one.numerator, two.numerator, three.numerator, four.numerator),
            totals=(one.denominator, two.denominator, three.denominator, four.denominator),
            hypothesis_length=len(hypothesis),
            reference_length=closest_ref_length(references, len(hypothesis)),
        )

    def __add__(self, other: "BleuCounts") -> "BleuCounts":
        a, b = self, other
        return BleuCounts(
            matches=(
                a.matches[0] + b.matches[0],
                a.matches[1] + b.matches[1],
                a.matches[2] + b.matches[2],
                a.matches[3] + b.matches[3],
            ),
            totals=(
                a.totals[0] + b.totals[0],
                a.totals[1] + b.totals[1],
                a.totals[2] + b.totals[2],
                a.totals[3] + b.totals[3],
            ),
            hypothesis_length=a.hypothesis_length + b.hypothesis_length,
            reference_length=a.reference_length + b.reference_length,
        )

    def brevity_penalty(self) -> float:
        """1 where the hypotheses are longer than their references, else exp(1 - r / c); 0 without words."""
        return float(brevity_penalty(self.reference_length, self.hypothesis_length))

    def scores(self) -> dict[str, float]:
        """bleu1..bleu4 times 100, in float64.

        Raises:
            ValueError: nothing was counted.
        """
        if 0 in self.totals:
            raise ValueError("BLEU of 0 captions is undefined: nothing was counted")
        if self.matches[0] == 0:
            return dict.fromkeys(BLEU_WEIGHTS, 0.0)
        # nltk's Fraction keeps 0/12 as it is; the standard one makes it 0/1 and so changes the smoothing.
        precisions = SmoothingFunction().method1(
            [Fraction(matched, total) for matched, total in zip(self.matches, self.totals, strict=True)]
        )
        logarithms = [math.log(precision) for precision in precisions]
        penalty = self.brevity_penalty()
        scores = {}
        for name, weights in BLEU_WEIGHTS.items():
            weighted = math.fsum(w * x for w, x in zip(weights, logarithms, strict=True))
            scores[name] = 100.0 * (penalty * math.exp(weighted))
        return scores
