"""Corpus BLEU from counts that add up over shards.

Scores equal nltk's ``corpus_bleu`` with ``SmoothingFunction().method1`` (Papineni et al. 2002; Chen & Cherry 2014,
smoothing 1). nltk counts each sentence, so its conventions apply:

* A hypothesis too short for an order adds 1, not 0, to the total of that order.
* The reference length is the one closest to the hypothesis; of two equally close ones, the shorter.
* Without any matching word the score is 0.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nltk.translate.bleu_score import (
    Fraction,
    SmoothingFunction,
    brevity_penalty,
    closest_ref_length,
    modified_precision,
)

# The weights of the report. Its BLEU-3 uses 0.333, 0.333, 0.334 instead of thirds.
BLEU_WEIGHTS: dict[str, tuple[float, ...]] = {
    "bleu1": (1.0, 0.0, 0.0, 0.0),
    "bleu2": (0.5, 0.5, 0.0, 0.0),
    "bleu3": (0.333, 0.333, 0.334, 0.0),
    "bleu4": (0.25, 0.25, 0.25, 0.25),
}
NUM_ORDERS = 4


Tokens = Literal["spaces", "marks"]
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def tokenize(caption: str, *, lowercase: bool = False, tokens: Tokens = "spaces") -> list[str]:
    """The tokens of a caption.

    `spaces`: split at white space, as in the report. `marks`: every mark of punctuation is a token by itself. Then
    ``dog's ball.`` and ``dog 's ball .`` are equal.
    """
    text = caption.lower() if lowercase else caption
    return text.split() if tokens == "spaces" else _WORD_OR_MARK.findall(text)


@dataclass(frozen=True)
class BleuCounts:
    """The counts of BLEU for any number of captions. They are integers, so sums are exact.

    Attributes:
        matches: for n = 1..4, the number of n-grams of the hypotheses that are in a reference (clipped).
        totals: for n = 1..4, the number of n-grams of the hypotheses (at least 1 per hypothesis).
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
        """1 if the hypotheses are longer than their references, else exp(1 - r / c). 0 without words."""
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
        # nltk's Fraction keeps 0/12. Python's Fraction reduces it to 0/1, which would change the smoothing.
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
