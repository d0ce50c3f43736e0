"""BLEU equals nltk's to the last digits, and sums over parts equal the whole."""

import importlib.util
import random
from pathlib import Path

import pytest
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

from mmcore.metrics.bleu import BleuCounts, tokenize

SHARED_CAPTIONS = Path(__file__).parents[3] / "shared" / "data" / "flickr8k" / "captions.txt"
# A copy, not an import, so that a change of the module's weights fails here.
WEIGHTS = [(1, 0, 0, 0), (0.5, 0.5, 0, 0), (0.333, 0.333, 0.334, 0), (0.25, 0.25, 0.25, 0.25)]

Corpus = list[tuple[list[str], list[list[str]]]]  # (hypothesis, references) of each image


def nltk_scores(corpus: Corpus) -> dict[str, float]:
    references = [references for _, references in corpus]
    hypotheses = [hypothesis for hypothesis, _ in corpus]
    scores = corpus_bleu(references, hypotheses, WEIGHTS, SmoothingFunction().method1)
    return {f"bleu{order}": 100.0 * score for order, score in enumerate(scores, start=1)}


def count(corpus: Corpus) -> BleuCounts:
    return sum((BleuCounts.of(*pair) for pair in corpus), BleuCounts())


def random_corpus(seed: int, *, num_images: int, num_words: int, max_length: int) -> Corpus:
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(num_words)]

    def sentence() -> list[str]:
        return rng.choices(words, k=rng.randint(0, max_length))

    return [(sentence(), [sentence() for _ in range(rng.randint(1, 5))]) for _ in range(num_images)]


def corpus_of(*pairs: tuple[str, list[str]]) -> Corpus:
    return [(hypothesis.split(), [text.split() for text in references]) for hypothesis, references in pairs]


HOSTILE: dict[str, Corpus] = {
    "empty hypothesis alone": corpus_of(("", ["a dog"])),
    "empty hypothesis among others": corpus_of(("", ["a dog"]), ("a dog runs", ["a dog runs"])),
    "empty references": corpus_of(("a", ["", ""]), ("a b", [""])),
    "all empty": corpus_of(("", [""])),
    "no word in common": corpus_of(("a b c d e", ["v w x y z"])),
    "words but no bigram": corpus_of(("a b c d e", ["e d c b a"])),
    "bigrams but no 3-gram": corpus_of(("a b x c d y", ["c d z a b"])),
    "one word": corpus_of(("dog", ["dog"])),
    "three words, exact": corpus_of(("a dog runs", ["a dog runs"])),
    "repeated word is clipped": corpus_of(("the the the the the the the", ["the cat the mat"])),
    "clipped over several references": corpus_of(("a a a b", ["a a", "a b b"])),
    "closest length is a tie": corpus_of(("a b c", ["a b c d", "a b"])),
    "much too long": corpus_of(("a " * 200, ["a b"])),
    "much too short": corpus_of(("a", ["a " * 50])),
    "unicode": corpus_of(("ein Hund läuft 犬", ["ein Hund läuft 犬 schnell"])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_corpora_score_as_nltk(name: str) -> None:
    assert count(HOSTILE[name]).scores() == pytest.approx(nltk_scores(HOSTILE[name]), rel=1e-12, abs=1e-12)


def test_all_hostile_corpora_together_score_as_nltk() -> None:
    corpus = [pair for pairs in HOSTILE.values() for pair in pairs]
    assert count(corpus).scores() == pytest.approx(nltk_scores(corpus), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num_words", [1, 2, 5, 30, 1000])
@pytest.mark.parametrize("max_length", [1, 4, 15])
def test_random_corpora_score_as_nltk(num_words: int, max_length: int) -> None:
    for seed in range(20):
        corpus = random_corpus(seed, num_images=1 + seed, num_words=num_words, max_length=max_length)
        assert count(corpus).scores() == pytest.approx(nltk_scores(corpus), rel=1e-12, abs=1e-12)


def test_parts_added_up_equal_the_whole_exactly() -> None:
    corpus = random_corpus(1, num_images=60, num_words=8, max_length=12)
    whole = count(corpus)
    rng = random.Random(2)
    for _ in range(20):
        rng.shuffle(corpus)
        cuts = sorted(rng.sample(range(len(corpus) + 1), 3))
        parts = [count(corpus[i:j]) for i, j in zip([0, *cuts], [*cuts, len(corpus)], strict=True)]
        rng.shuffle(parts)
        assert sum(parts, BleuCounts()) == whole  # integers, so exactly equal
        assert sum(parts, BleuCounts()).scores() == whole.scores()


def test_zero_matches_keep_their_denominator() -> None:
    # method1 smooths 0/12 to 0.1/12. A reduced fraction would give 0.1/1.
    counts = BleuCounts(matches=(13, 0, 0, 0), totals=(13, 12, 11, 10), hypothesis_length=13, reference_length=13)
    assert counts.scores()["bleu2"] == pytest.approx(100 * (0.1 / 12) ** 0.5, rel=1e-12)


def test_brevity_penalty_is_of_the_sums() -> None:
    short, long = BleuCounts.of(["a"], [["a"] * 4]), BleuCounts.of(["a"] * 9, [["a"] * 4])
    assert short.brevity_penalty() == pytest.approx(2.718281828459045**-3)
    assert (short + long).brevity_penalty() == 1.0


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 captions"):
        BleuCounts().scores()
    with pytest.raises(ValueError, match="at least one reference"):
        BleuCounts.of(["a"], [])


def test_tokens_are_split_at_white_space_with_case_kept() -> None:
    assert tokenize(" A  dog,\truns .\n") == ["A", "dog,", "runs", "."]
    assert tokenize("A Dog", lowercase=True) == ["a", "dog"]
    spaced = ["A", "dog", "'", "s", "two", "-", "tone", "ball", "."]
    for text in ("A dog's two-tone ball.", "A dog 's two-tone ball .", "A dog ' s two - tone ball ."):
        assert tokenize(text, tokens="marks") == spaced


def real_corpus(num_images: int) -> Corpus:
    """Real captions: the first of each image against its other four."""
    if not SHARED_CAPTIONS.exists():
        pytest.skip("../shared/data/flickr8k is not there")
    captions: dict[str, list[list[str]]] = {}
    for line in SHARED_CAPTIONS.read_text(encoding="utf-8").split("\n")[1 : 1 + 5 * num_images]:
        name, _, caption = line.partition(",")
        captions.setdefault(name, []).append(caption.split())
    return [(first, others) for first, *others in captions.values()]


def test_real_captions_score_as_nltk() -> None:
    corpus = real_corpus(400)
    scores = count(corpus).scores()
    assert scores == pytest.approx(nltk_scores(corpus), rel=1e-12, abs=1e-12)
    assert 10 < scores["bleu4"] < scores["bleu3"] < scores["bleu2"] < scores["bleu1"] < 80


@pytest.mark.skipif(importlib.util.find_spec("pycocoevalcap") is None, reason="pycocoevalcap is not installed")
def test_pycocoevalcap_agrees_where_all_counts_are_high() -> None:
    from pycocoevalcap.bleu.bleu import Bleu

    corpus = real_corpus(400)
    references = {i: [" ".join(words) for words in references] for i, (_, references) in enumerate(corpus)}
    hypotheses = {i: [" ".join(hypothesis)] for i, (hypothesis, _) in enumerate(corpus)}
    scores, _ = Bleu(4).compute_score(references, hypotheses, verbose=0)
    ours = count(corpus).scores()
    # Measured differences on 400 and 1,619 images: 1e-11, 1e-11, 0.023 and 0.001. Its BLEU-3 uses thirds as weights,
    # and its totals leave out captions shorter than the order.
    for order, score in enumerate(scores, start=1):
        assert ours[f"bleu{order}"] == pytest.approx(100 * score, abs=0.03 if order == 3 else 0.002)
