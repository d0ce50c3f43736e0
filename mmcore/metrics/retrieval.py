"""Retrieval: how high the right text of an image stands among all texts, and the right image of a text.

R@k is the share of queries whose right answer is among the first k. An image has several texts; its best one counts.
Ranks begin at 1. A wrong answer with an equal similarity stands before the right one, so ties count against the model.

Shapes: N images, M texts, B queries, K answers of a query that a second model scores again.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating]
Integers = npt.NDArray[np.integer]
RECALLS_AT = (1, 5, 10)


@dataclass(frozen=True)
class RankCounts:
    """How often each rank occurs. Counts of parts of the queries add up to those of all queries."""

    counts: Counter[int] = field(default_factory=Counter)

    @classmethod
    def of(cls, ranks: Integers) -> "RankCounts":
        return cls(Counter(ranks.tolist()))

    def __add__(self, other: "RankCounts") -> "RankCounts":
        return RankCounts(self.counts + other.counts)

    def scores(self) -> dict[str, float]:
        """`recall_at_1`, `recall_at_5` and `recall_at_10` in percent, and `median_rank`.

        Raises:
            ValueError: nothing was counted.
        """
        num_queries = self.counts.total()
        if not num_queries:
            raise ValueError("the recall of 0 queries is undefined: nothing was counted")
        found = {
            f"recall_at_{most}": 100 * sum(number for rank, number in self.counts.items() if rank <= most) / num_queries
            for most in RECALLS_AT
        }
        ranks, numbers = zip(*sorted(self.counts.items()), strict=True)
        # The two middle queries; for an odd number they are the same.
        middle = [(num_queries - 1) // 2, num_queries // 2]
        places = np.searchsorted(np.cumsum(numbers), middle, side="right")
        return found | {"median_rank": sum(ranks[place] for place in places) / 2}


@dataclass(frozen=True)
class RetrievalCounts:
    """The ranks of both directions."""

    image_to_text: RankCounts = field(default_factory=RankCounts)
    text_to_image: RankCounts = field(default_factory=RankCounts)

    @classmethod
    def of(cls, similarity_NM: Floats, image_of_text_M: Integers) -> "RetrievalCounts":
        """The ranks of all images and texts; arguments as for `text_ranks` and `image_ranks`."""
        own_images = np.arange(len(similarity_NM))
        return cls(
            RankCounts.of(text_ranks(similarity_NM, own_images, image_of_text_M)),
            RankCounts.of(image_ranks(similarity_NM.T, image_of_text_M)),
        )

    @classmethod
    def reranked(
        cls, similarity_NM: Floats, scores_NM: Floats, num_best: int, image_of_text_M: Integers
    ) -> "RetrievalCounts":
        """The ranks after a second score has ordered the `num_best` answers of each query, in either direction.

        `scores_NM`: of all pairs, or at least of those that `pairs_to_rerank` names.
        """
        both = []
        for first, second in ((similarity_NM, scores_NM), (similarity_NM.T, scores_NM.T)):
            answers = best_answers(first, num_best)
            both.append(rerank(first, answers, np.take_along_axis(second, answers, axis=1)))
        own_images = np.arange(len(similarity_NM))
        return cls(
            RankCounts.of(text_ranks(both[0], own_images, image_of_text_M)),
            RankCounts.of(image_ranks(both[1], image_of_text_M)),
        )

    def __add__(self, other: "RetrievalCounts") -> "RetrievalCounts":
        return RetrievalCounts(
            self.image_to_text + other.image_to_text,
            self.text_to_image + other.text_to_image,
        )

    def scores(self) -> dict[str, float]:
        """The scores of `RankCounts` with the names `image_to_text_...` and `text_to_image_...`."""
        both = {"image_to_text": self.image_to_text, "text_to_image": self.text_to_image}
        return {f"{way}_{name}": value for way, counts in both.items() for name, value in counts.scores().items()}


def text_ranks(similarity_BM: Floats, image_B: Integers, image_of_text_M: Integers) -> npt.NDArray[np.int64]:
    """The rank of the best right text of each image among all texts: int64 (B,).

    Args:
        similarity_BM: of some images with all texts.
        image_B: indices of these images.
        image_of_text_M: index of the image of each text.
    Raises:
        ValueError: an image has no text, or a similarity is not a number.
    """
    _check(similarity_BM)
    right_BM = image_B[:, None] == image_of_text_M
    without = np.flatnonzero(~right_BM.any(axis=1))
    if len(without):
        raise ValueError(f"{len(without)} images have no text, such as image {image_B[without[0]]}")
    best_B1 = np.where(right_BM, similarity_BM, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity_BM >= best_B1) & ~right_BM).sum(axis=1)


def image_ranks(similarity_BN: Floats, image_B: Integers) -> npt.NDArray[np.int64]:
    """The rank of the image of each text among all images: int64 (B,).

    Args:
        similarity_BN: of some texts with all images.
        image_B: index of the image of each of these texts.
    Raises:
        ValueError: a similarity is not a number.
    """
    _check(similarity_BN)
    own_B1 = np.take_along_axis(similarity_BN, image_B[:, None], axis=1)
    # The right image itself is equal to itself, which makes ranks begin at 1.
    return (similarity_BN >= own_B1).sum(axis=1)


def _check(similarity: Floats) -> None:
    # A comparison with NaN is false. Such a query would have rank 1.
    if np.isnan(similarity).any():
        raise ValueError(f"{np.isnan(similarity).sum()} of {similarity.size} similarities are not numbers")


def best_answers(similarity_BM: Floats, num_best: int) -> npt.NDArray[np.int64]:
    """The most similar answers of each query, best first: int64 (B, K) with K at most `num_best`."""
    _check(similarity_BM)
    return np.argsort(-similarity_BM, axis=1, kind="stable")[:, :num_best]


def pairs_to_rerank(similarity_NM: Floats, num_best: int) -> npt.NDArray[np.bool_]:
    """Which pairs are among the `num_best` answers of the image or of the text: bool (N, M)."""
    wanted_NM = np.zeros(similarity_NM.shape, bool)
    np.put_along_axis(wanted_NM, best_answers(similarity_NM, num_best), True, axis=1)
    np.put_along_axis(wanted_NM.T, best_answers(similarity_NM.T, num_best), True, axis=1)
    return wanted_NM


def rerank(similarity_BM: Floats, answers_BK: Integers, scores_BK: Floats) -> npt.NDArray[np.float64]:
    """Similarities in which a second score orders the best answers, as ITM does in ALBEF (arXiv 2107.07651, 4).

    The best answers of a query stay before all others, whose order does not change. Equal scores stay equal.

    Args:
        similarity_BM: of some queries with all answers, in either direction.
        answers_BK: of `best_answers`.
        scores_BK: their second scores. BLIP-2 adds the first similarity to the score of ITM. ALBEF does not.
    Returns: float64 (B, M) for `text_ranks` or `image_ranks`. Only the order of the values has a meaning.
    """
    _check(scores_BK)
    ordered_BM = _places(similarity_BM)
    np.put_along_axis(ordered_BM, answers_BK, similarity_BM.shape[1] + _places(scores_BK), axis=1)
    return ordered_BM


def _places(values_BM: Floats) -> npt.NDArray[np.float64]:
    """The place of each value in its row, the lowest first. Equal values have the same place."""
    order_BM = np.argsort(values_BM, axis=1, kind="stable")
    sorted_BM = np.take_along_axis(values_BM, order_BM, axis=1)
    rises_BM = np.diff(sorted_BM, axis=1, prepend=sorted_BM[:, :1]) > 0
    places_BM = np.empty(values_BM.shape)
    np.put_along_axis(places_BM, order_BM, rises_BM.cumsum(axis=1).astype(float), axis=1)
    return places_BM
