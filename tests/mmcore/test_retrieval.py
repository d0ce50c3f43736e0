"""Ranks of retrieval against a search in plain Python, their sums over shards, and the second scores."""

import numpy as np
import pytest

from mmcore.metrics.retrieval import (
    RankCounts,
    RetrievalCounts,
    best_answers,
    image_ranks,
    pairs_to_rerank,
    rerank,
    text_ranks,
)

NUM_IMAGES = 31
# Each image has one to five texts, which are not adjacent.
IMAGE_OF_TEXT = np.concatenate([np.arange(max(0, NUM_IMAGES - 7 * part)) for part in range(5)])


def similarity() -> np.ndarray:
    """Few different values, so that ties are frequent. Right pairs are a little higher."""
    values = np.random.default_rng(0).integers(0, 12, (NUM_IMAGES, len(IMAGE_OF_TEXT)))
    return (values + 4 * (np.arange(NUM_IMAGES)[:, None] == IMAGE_OF_TEXT)) / 16


def searched(values: np.ndarray) -> tuple[list[int], list[int]]:
    """Sort all answers of a query, wrong ones first among equals, and find the first right one."""
    of_images, of_texts = [], []
    for image in range(values.shape[0]):
        answers = sorted((-values[image, text], IMAGE_OF_TEXT[text] == image) for text in range(values.shape[1]))
        of_images.append(1 + [right for _, right in answers].index(True))
    for text in range(values.shape[1]):
        answers = sorted((-values[image, text], IMAGE_OF_TEXT[text] == image) for image in range(values.shape[0]))
        of_texts.append(1 + [right for _, right in answers].index(True))
    return of_images, of_texts


def reference(ranks: list[int]) -> dict[str, float]:
    recalls = {f"recall_at_{most}": 100 * float(np.mean(np.array(ranks) <= most)) for most in (1, 5, 10)}
    return recalls | {"median_rank": float(np.median(ranks))}


def test_scores_equal_a_search_in_plain_python() -> None:
    values = similarity()
    of_images, of_texts = searched(values)
    assert text_ranks(values, np.arange(NUM_IMAGES), IMAGE_OF_TEXT).tolist() == of_images
    assert image_ranks(values.T, IMAGE_OF_TEXT).tolist() == of_texts
    expected = {f"image_to_text_{name}": value for name, value in reference(of_images).items()}
    expected |= {f"text_to_image_{name}": value for name, value in reference(of_texts).items()}
    found = RetrievalCounts.of(values, IMAGE_OF_TEXT).scores()
    assert found == pytest.approx(expected, abs=1e-12)
    assert 1 < found["text_to_image_median_rank"] < NUM_IMAGES


@pytest.mark.parametrize("ranks", [[3], [4, 1], [2, 2, 9, 7], [1, 1, 1, 5, 6], [10, 11]])
def test_the_median_is_that_of_numpy(ranks: list[int]) -> None:
    assert RankCounts.of(np.array(ranks)).scores() == pytest.approx(reference(ranks))


def test_scores_of_the_whole_are_those_of_the_parts_added_up() -> None:
    values = similarity()
    total = RetrievalCounts()
    images, texts = np.arange(NUM_IMAGES), np.arange(len(IMAGE_OF_TEXT))
    for images_B, texts_B in zip(np.array_split(images, 4), np.array_split(texts, 4), strict=True):
        of_images = RankCounts.of(text_ranks(values[images_B], images_B, IMAGE_OF_TEXT))
        of_texts = RankCounts.of(image_ranks(values.T[texts_B], IMAGE_OF_TEXT[texts_B]))
        total += RetrievalCounts(of_images, of_texts)
    assert total == RetrievalCounts.of(values, IMAGE_OF_TEXT)
    assert total.scores() == RetrievalCounts.of(values, IMAGE_OF_TEXT).scores()


def test_equal_similarities_count_against_the_model() -> None:
    """A model that gives all pairs one score finds nothing before the last place."""
    scores = RetrievalCounts.of(np.zeros((NUM_IMAGES, NUM_IMAGES)), np.arange(NUM_IMAGES)).scores()
    assert scores["image_to_text_median_rank"] == scores["text_to_image_median_rank"] == NUM_IMAGES
    assert scores["image_to_text_recall_at_10"] == 0


def test_a_second_score_orders_the_best_answers() -> None:
    values = np.array([[0.1, 0.9, 0.5, 0.7, 0.3], [0.5, 0.5, 0.1, 0.8, 0.2]])
    answers = best_answers(values, 3)
    assert answers.tolist() == [[1, 3, 2], [3, 0, 1]]
    again = rerank(values, answers, np.array([[-5.0, -7.0, -2.0], [0.1, 0.4, 0.4]]))
    assert np.argsort(-again[0]).tolist() == [2, 1, 3, 4, 0]
    assert again[1, 0] == again[1, 1] > again[1, 3] > again[1, 4] > again[1, 2]
    assert image_ranks(again, np.array([2, 0])).tolist() == [1, 2]
    # The right answer is not among the best: its rank stays.
    assert image_ranks(again, np.array([4, 4])).tolist() == image_ranks(values, np.array([4, 4])).tolist() == [4, 4]


@pytest.mark.parametrize("num_best", [1, 4, 1000])
def test_the_first_similarity_as_second_score_changes_no_rank(num_best: int) -> None:
    # Random numbers make every similarity another one.
    values = similarity() + np.random.default_rng(1).random((NUM_IMAGES, len(IMAGE_OF_TEXT)))
    answers = best_answers(values, num_best)
    again = rerank(values, answers, np.take_along_axis(values, answers, axis=1))
    assert (np.argsort(again, axis=1) == np.argsort(values, axis=1)).all()


def searched_again(first: np.ndarray, second: np.ndarray, right: np.ndarray, num_best: int) -> int:
    """The rank of one query by sorting: the best by the first score, ordered by the second, before all others."""
    order = sorted(range(len(first)), key=lambda answer: -first[answer])
    best = sorted(order[:num_best], key=lambda answer: -second[answer])
    return 1 + [bool(right[answer]) for answer in best + order[num_best:]].index(True)


@pytest.mark.parametrize("num_best", [1, 5, 1000])
def test_both_directions_are_ordered_again(num_best: int) -> None:
    random = np.random.default_rng(2)
    first, second = (random.random((NUM_IMAGES, len(IMAGE_OF_TEXT))) for _ in range(2))
    right = np.arange(NUM_IMAGES)[:, None] == IMAGE_OF_TEXT
    wanted = pairs_to_rerank(first, num_best)
    assert wanted.all() == (num_best == 1000)
    # No score but those that are wanted is read.
    found = RetrievalCounts.reranked(first, np.where(wanted, second, np.nan), num_best, IMAGE_OF_TEXT)
    of_images = [searched_again(*each, num_best) for each in zip(first, second, right, strict=True)]
    of_texts = [searched_again(*each, num_best) for each in zip(first.T, second.T, right.T, strict=True)]
    assert found.image_to_text == RankCounts.of(np.array(of_images))
    assert found.text_to_image == RankCounts.of(np.array(of_texts))
    if num_best == 1000:
        assert found == RetrievalCounts.of(second, IMAGE_OF_TEXT)


@pytest.mark.parametrize("measure", [text_ranks, lambda values, images, _: image_ranks(values, images)])
def test_a_similarity_that_is_not_a_number_is_refused(measure) -> None:
    values = np.eye(3)
    values[1, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 9 similarities are not numbers"):
        measure(values, np.arange(3), np.arange(3))


def test_an_image_without_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="1 images have no text, such as image 2"):
        RetrievalCounts.of(np.eye(3), np.array([0, 1, 0]))
    with pytest.raises(ValueError, match="0 queries"):
        RankCounts().scores()
