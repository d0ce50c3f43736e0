"""The scores of evaluate.py that a trained retriever gives, on untrained models."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_matcher
import torch
import torch.nn.functional as F
from test_evaluate_images import write_sweep

from jobs.evaluate import (
    ClipScoreSettings,
    LabelScoreSettings,
    RetrievalScoreSettings,
    evaluate_clip_score,
    evaluate_labels,
    evaluate_retrieval,
)
from jobs.runtime.scores_line import clip_score_line, labels_line, retrieval_line
from mmcore.data.prepared import prepared_images, read_captions
from mmcore.errors import InputError
from mmcore.frozen.vision import pixels_from_bytes
from mmcore.images import png_bytes
from mmcore.metrics.clip_score import clip_scores
from mmcore.metrics.retrieval import RetrievalCounts
from mmcore.recipe import Retriever
from mmcore.storage import Storage
from mmcore.trained import retriever as retriever_module
from mmcore.trained.captioner import open_captioner
from mmcore.trained.retriever import open_retriever

SPLIT = "validation"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """15 images to rank, and no two captions alike: rounding would decide which of two equal ones is the better."""
    longer = {row: tiny.captions_of(row)[1] for row in range(17)}
    monkeypatch.setattr(tiny, "captions_of", lambda row: [longer[row], longer[row].removeprefix("there is ")])
    tiny.write_dataset(Storage(str(tmp_path)), num_train=2, num_validation=15)
    return Storage(str(tmp_path))


def rows_of(storage: Storage, retriever: Retriever) -> tuple[np.ndarray, list[list[str]]]:
    """The pixels and the captions of the images of `SPLIT`."""
    table, images = read_captions(storage, "tiny", "split"), dict(prepared_images(storage.uri, "tiny"))
    rows = table.rows(SPLIT)
    ids = [table.image_ids[row] for row in rows]
    pixels = pixels_from_bytes([images[image_id] for image_id in ids], retriever.image_size, ids)
    return pixels, [table.captions[row] for row in rows]


def itm_of_all(retriever: Any, pixels: np.ndarray, texts: list[str]) -> np.ndarray:
    """Log-odds of all pairs, one after the other and by another way than `Retriever.match`."""
    model, scores = retriever.model, np.zeros((len(pixels), len(texts)))
    with torch.inference_mode():
        for column, text in enumerate(texts):
            ids = torch.tensor([retriever.tokenizer.encode(text, retriever.max_length)])
            for row in range(len(pixels)):
                memory = model.memory(torch.from_numpy(pixels[row : row + 1]))
                scores[row, column] = model.match(memory, ids, torch.ones_like(ids))[0]
    return scores


def test_a_qformer_is_ranked_by_itc_and_then_by_itm(storage: Storage) -> None:
    run = tiny_matcher.write_qformer(Path(storage.uri))
    settings = RetrievalScoreSettings(run, storage.uri, "tiny", f"split:{SPLIT}", batch_size=4)
    retriever: Any = open_retriever(run).load()
    pixels, captions = rows_of(storage, retriever)
    texts, owners = [text for each in captions for text in each], np.repeat(np.arange(15), 2)
    cosines = torch.einsum("nqf,mf->nqm", retriever.image_features(pixels), retriever.text_features(texts))
    itc, itm = cosines.amax(dim=1).numpy(), itm_of_all(retriever, pixels, texts)
    assert itm.std() > 0.1, "pairs that are alike would have no order"
    # Texts of other lengths are padded, and the keys of the image are shared. Measured difference at most 2e-6.
    for row, scores in enumerate(retriever.match(pixels, [texts] * 15)):
        np.testing.assert_allclose(scores.numpy(), itm[row], rtol=0, atol=1e-4)

    alone = evaluate_retrieval(dataclasses.replace(settings, rerank=0))
    of_itc = RetrievalCounts.of(itc, owners).scores()
    assert {name: alone[name] for name in of_itc} == of_itc
    assert alone["ranked_by"] == "ITC"
    few, every = RetrievalCounts.reranked(itc, itm, 8, owners), RetrievalCounts.of(itm, owners)
    assert len({str(scores) for scores in (of_itc, few.scores(), every.scores())}) == 3, "what is ranked by matters"
    for num_best, ranked in ((8, few), (None, every)):
        result = evaluate_retrieval(dataclasses.replace(settings, rerank=num_best))
        expected = ranked.scores()
        assert {name: result[name] for name in expected} == expected
        assert (result["itc"], result["ranked_by"]) == (of_itc, f"ITC, then the best {num_best or 128} by ITM")
        assert (result["run"], result["settings"]["rerank"]) == (run, num_best)
        written = (storage / "scores" / "qformer").read(f"tiny-tiny-split-validation-rerank{num_best or 128}.json")
        assert json.loads(written) == result
    assert open_captioner(run).image_size == 32, "the same run captions"


def test_a_pair_has_nothing_to_rank_again_by(storage: Storage) -> None:
    run = tiny_matcher.write_pair(Path(storage.uri))
    settings = RetrievalScoreSettings(run, storage.uri, "tiny", f"split:{SPLIT}")
    result = evaluate_retrieval(settings)
    assert result["ranked_by"] == "cosine"
    to_text, to_image = (
        f"recall@1 {result[f'{way}_recall_at_1']:.1f} %, recall@10 {result[f'{way}_recall_at_10']:.1f} %"
        for way in ("image_to_text", "text_to_image")
    )
    line = f"{to_text} image to text; {to_image} text to image; 15 images and 30 texts of split:{SPLIT}"
    assert retrieval_line(result) == line
    for change, message in (
        ({"rerank": 4}, "--rerank 4: .* compares features alone and has no ITM; leave the flag out"),
        ({"rerank": -1}, "--rerank -1: must be at least 0"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"captions_per_image": 0}, "--captions-per-image 0: must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate_retrieval(dataclasses.replace(settings, **change))


# -- labels --------------------------------------------------------------------------------------------------------

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ByColour:
    """Compares the mean colour of an image with the colours that a text names."""

    image_size, max_length, reads_pairs = 4, 16, False

    def identity(self) -> dict[str, str]:
        return {"run": "/out/runs/clip/colours", "weights_sha256": "0" * 64}

    def load(self, device: str) -> "ByColour":
        return self

    def image_features(self, pixels: np.ndarray) -> torch.Tensor:
        return F.normalize(torch.from_numpy(pixels).float().mean(dim=(1, 2)), dim=-1)[:, None]

    def text_features(self, texts: list[str]) -> torch.Tensor:
        assert all(text.startswith("a picture of ") for text in texts)
        colours = [sum(np.array(rgb) for name, rgb in COLOURS.items() if name in text.split()) for text in texts]
        return F.normalize(torch.tensor(np.array(colours)).float(), dim=-1)


@pytest.fixture
def by_colour(monkeypatch: pytest.MonkeyPatch) -> LabelScoreSettings:
    monkeypatch.setattr(retriever_module, "open_retriever", lambda run, encoder: ByColour())
    return LabelScoreSettings("run", "images", template="a picture of {}", batch_size=2)


def square(colour: str) -> bytes:
    return png_bytes(np.full((6, 6, 3), COLOURS[colour], np.uint8))


def write_folders(folder: Path) -> str:
    """A green image lies in the folder of the red ones. One image lies in no folder of a label."""
    for name, colour in {
        "red/1": "red",
        "red/2": "green",
        "sky_blue/1": "blue",
        "x/green/1": "green",
        "5": "red",
    }.items():
        (folder / f"{name}.png").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(square(colour))
    return str(folder)


def test_labels_of_folders(by_colour: LabelScoreSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out = write_folders(tmp_path / "images"), tmp_path / "out"
    result = evaluate_labels(dataclasses.replace(by_colour, images=images, out=str(out)))
    assert (result["accuracy"], result["chance"]) == (75, pytest.approx(100 / 3))
    assert (result["num_images"], result["num_with_true_label"]) == (5, 4)
    assert result["labels"] == {
        "green": {"num_images": 1, "num_chosen": 2, "accuracy": 100},
        "red": {"num_images": 2, "num_chosen": 2, "accuracy": 50},
        "sky_blue": {"num_images": 1, "num_chosen": 1, "accuracy": 100},
    }
    assert (out / "labels.csv").read_text().splitlines() == [
        "image,label,cosine,true_label",
        "5.png,red,1.000000,",
        "red/1.png,red,1.000000,red",
        "red/2.png,green,1.000000,red",
        "sky_blue/1.png,sky_blue,1.000000,sky_blue",
        "x/green/1.png,green,1.000000,green",
    ]
    assert capsys.readouterr().out == "", "the output is the result alone"
    # Labels that are given; what lies in another folder has no true label among them.
    some = evaluate_labels(dataclasses.replace(by_colour, images=images, labels=("red", "green")))
    assert (some["accuracy"], some["num_with_true_label"]) == (pytest.approx(200 / 3), 3)
    assert "labels: images of 'sky_blue' do not count, as --labels has no such label" in capsys.readouterr().err
    none = evaluate_labels(dataclasses.replace(by_colour, images=images, labels=("dark blue", "light blue")))
    assert (none["accuracy"], none["num_with_true_label"]) == (None, 0)
    told = "66.7 % of 3 images with a true label have the right one; chance 50.0 %"
    assert [labels_line(some), labels_line(none)] == [told, "5 images labelled; no true label is known"]
    assert "labels: 'dark blue', 'light blue' are the same to this run" in capsys.readouterr().err


def test_labels_of_a_column(by_colour: LabelScoreSettings, tmp_path: Path) -> None:
    rows = [("red", "red"), ("red", "green"), ("green", None), ("green", "green")]
    columns = {
        "image_id": list("abcd"),
        "image": [square(colour) for colour, _ in rows],
        "kind": [label for _, label in rows],
    }
    pq.write_table(pa.table(columns), tmp_path / "part.parquet")
    settings = dataclasses.replace(by_colour, images=str(tmp_path), column="kind")
    result = evaluate_labels(settings)
    assert (result["accuracy"], result["num_with_true_label"], list(result["labels"])) == (
        pytest.approx(200 / 3),
        3,
        ["green", "red"],
    )
    with pytest.raises(InputError, match="no column 'sort'; give --column one of image_id, image, kind"):
        evaluate_labels(dataclasses.replace(settings, column="sort"))
    with pytest.raises(InputError, match="--labels: two or more are needed, and none are there in"):
        evaluate_labels(dataclasses.replace(settings, column=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"template": "a photo"}, "--template 'a photo': must have {} once, for the label"),
        ({"labels": ("dog",)}, "--labels dog: give two or more, none of them twice"),
        ({"labels": ("dog", "cat", "dog")}, "--labels dog cat dog: give two or more, none of them twice"),
        ({"batch_size": 0}, "--batch-size 0: must be at least 1"),
        ({"column": "kind"}, "--column kind: .* holds image files, whose folders are the labels"),
    ],
)
def test_wrong_labels(by_colour: LabelScoreSettings, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    settings = dataclasses.replace(by_colour, images=write_folders(tmp_path / "images"), **change)
    with pytest.raises(InputError, match=message):
        evaluate_labels(settings)


# -- the score of texts --------------------------------------------------------------------------------------------


def test_the_score_of_captions_and_of_generated_images(storage: Storage, tmp_path: Path) -> None:
    run = tiny_matcher.write_pair(Path(storage.uri))
    retriever: Any = open_retriever(run).load()
    name = f"clip_score[clip/tiny@{retriever.identity()['weights_sha256'][:8]}]"
    pixels, captions = rows_of(storage, retriever)
    texts = [text for each in captions for text in each]
    cosines = np.array([[float(each[0]) for each in retriever.match(pixels, [[text]] * 15)] for text in texts])
    owners = np.repeat(np.arange(15), 2)
    of_pairs = 2.5 * np.maximum(cosines, 0)
    settings = ClipScoreSettings(run, storage=storage.uri, dataset="tiny", split=f"split:{SPLIT}", batch_size=4)
    own = evaluate_clip_score(settings)
    # Measured difference at most 1e-7.
    assert own[name] == pytest.approx(of_pairs[np.arange(30), owners].mean(), abs=1e-5)
    assert (own["num_images"], own["num_texts"], own["run"]) == (15, 30, run)
    line = clip_score_line(own)
    assert line.startswith(f"{name} {own[name]:.3f}, {own['shuffled']:.3f} with")
    assert "30 texts" in line

    table = read_captions(storage, "tiny", "split")
    rows = table.rows(SPLIT)
    lines = [f"{table.image_ids[row]}.png,{captions[place][1]}" for place, row in enumerate(rows)]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *lines, ""]))
    predicted = evaluate_clip_score(dataclasses.replace(settings, predictions=str(tmp_path / "captions.csv")))
    assert predicted[name] == pytest.approx(of_pairs[np.arange(1, 30, 2), np.arange(15)].mean(), abs=1e-5)
    assert (predicted["num_images"], predicted["num_texts"]) == (15, 15)

    # Of two images, each gets the caption of the other one.
    (tmp_path / "two.csv").write_text("\n".join(["image,caption", *lines[:2], ""]))
    two = evaluate_clip_score(dataclasses.replace(settings, split=None, predictions=str(tmp_path / "two.csv")))
    assert two["shuffled"] == pytest.approx((of_pairs[1, 1] + of_pairs[3, 0]) / 2, abs=1e-5)
    assert two["shuffled"] != pytest.approx(two[name], abs=1e-5)
    (tmp_path / "one.csv").write_text("\n".join(["image,caption", *lines[:1], ""]))
    with pytest.raises(InputError, match="1 image: at least 2 are needed to measure chance"):
        evaluate_clip_score(dataclasses.replace(settings, split=None, predictions=str(tmp_path / "one.csv")))

    images = [png_bytes(image) for image in pixels]
    sweep = write_sweep(tmp_path / "sweep", images, [each[1] for each in captions])
    generated = evaluate_clip_score(ClipScoreSettings(run, sweep=sweep, batch_size=4))
    assert generated[name] == pytest.approx(predicted[name], abs=1e-5)
    assert generated["num_images"] == 15
    unfinished = write_sweep(tmp_path / "unfinished", images, [each[1] for each in captions], num_rows=16)
    with pytest.raises(InputError, match="15 of 16 images are there"):
        evaluate_clip_score(ClipScoreSettings(run, sweep=unfinished))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "--sweep and --storage: give one of them"),
        ({"sweep": "a", "storage": "b"}, "--sweep and --storage: give one of them"),
        ({"sweep": "a", "predictions": "c.csv"}, "--predictions c.csv: has no effect with --sweep"),
        ({"storage": "a", "batch_size": 0}, "--batch-size 0: must be at least 1"),
    ],
)
def test_wrong_settings_of_the_score(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_clip_score(ClipScoreSettings("run", **change))


def test_a_match_that_is_worse_than_none_counts_nothing() -> None:
    assert clip_scores(np.array([0.4, -0.5, 1.0])).tolist() == [1.0, 0.0, 2.5]
