"""jobs/capfilt.py: which captions it keeps, and that its dataset is one that trains."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_matcher
from test_caption_job import write_run

from jobs.bench import shuffled_captions
from jobs.capfilt import (
    PAGE,
    CapfiltSettings,
    ScoreCaptions,
    Scored,
    capfilt,
    decide,
    main,
    match_scores,
    scored_rows,
    threshold_of_share,
)
from mmcore.captioners.search_options import GREEDY
from mmcore.data.prepared import read_captions, read_prepared
from mmcore.errors import InputError
from mmcore.storage import Storage
from mmcore.trained.captioner import open_captioner
from mmcore.trained.retriever import open_retriever


def test_what_becomes_of_captions() -> None:
    row = Scored("a", ["good", "bad", "worse"], [0.5, 0.1, 0.0], "new", 0.4)
    assert decide(row, "replace", 0.3)[0] == ["good", "new"]
    captions, fates = decide(row, "add", 0.3)
    assert captions == ["good", "new"]
    assert [fate for *_, fate in fates] == ["kept", "dropped", "dropped", "added"]
    assert decide(row, "replace", 0.45)[0] == ["good"], "the captioner's caption matches too little"
    assert decide(row, "replace", 0.0)[0] == ["good", "bad", "worse"], "no place is free"
    assert decide(row, "add", 0.0)[0] == ["good", "bad", "worse", "new"]
    assert decide(dataclasses.replace(row, written="good"), "add", 0.3)[0] == ["good"], "it is there already"
    assert decide(dataclasses.replace(row, written=None), "keep", 0.6)[0] == []
    assert threshold_of_share(np.array([4.0, 1.0, 3.0, 2.0]), 0.5) == 3.0


def test_scores_are_those_of_the_image(tmp_path: Path) -> None:
    """Texts of several images are scored at once; each image may have another number of them."""
    matcher = open_retriever(tiny_matcher.write_pair(tmp_path)).load()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    texts = [tiny.captions_of(0), [], tiny.captions_of(1)[:1]]
    scores = match_scores(matcher, pixels, texts)
    assert [len(each) for each in scores] == [2, 0, 1]
    alone = matcher.image_features(pixels[2:])[0, 0] @ matcher.text_features(texts[2])[0]
    assert scores[2][0] == pytest.approx(float(alone), abs=1e-5)  # measured: 3e-8

    # A Q-Former gives the probability that a pair matches, and reads the pairs of an image together.
    qformer = open_retriever(tiny_matcher.write_qformer(tmp_path)).load()
    several = match_scores(qformer, pixels, texts)
    assert [len(each) for each in several] == [2, 0, 1]
    log_odds = qformer.match(pixels[2:], [texts[2]])[0]
    assert several[2][0] == pytest.approx(1 / (1 + np.exp(-float(log_odds))), abs=1e-5)  # measured: 3e-8
    captioner = open_captioner(str(write_run(tmp_path / "runs" / "resnet_captioner" / "tiny")))
    tiny.write_dataset(Storage(str(tmp_path)), num_train=2, num_validation=1)
    images = read_prepared(str(tmp_path), "tiny", ["image_id", "file_name", "image", "captions"]).to_pydict()
    table = ScoreCaptions(matcher, captioner, GREEDY)(images | {"gone": []}).to_pylist()
    assert [len(row["scores"]) for row in table] == [2, 2, 2]
    assert all(-1 <= row["written_score"] <= 1 and row["written"] is not None for row in table)


def test_it_writes_a_dataset(call_job: Callable[..., Any], tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "out"))
    tiny.write_dataset(storage)
    noisy = shuffled_captions.WriteSettings(storage.uri, "noisy", "tiny", "split", share=0.25)
    facts = shuffled_captions.write(noisy)
    assert facts["num_captions"] == 96
    matcher = tiny_matcher.write_pair(tmp_path)
    flags = ["--matcher", matcher, "--storage", storage, "--dataset", "noisy", "--split", "split", "--name", "clean"]
    flags += ["--rows-per-block", "7"]
    refused = call_job(main, *flags, check=False)
    assert (refused.returncode, refused.stderr) == (
        1,
        "error: --threshold and --share: give one of them, such as --share 0.7\n",
    )
    call_job(main, *flags, "--share", "0.75")
    summary = json.loads((storage / "data" / "clean").read("capfilt.json"))
    assert (summary["num_kept"], summary["num_dropped"]) == (60, 20)
    page = (storage / "data" / "clean").read(PAGE).decode()
    assert "✓ kept" in page
    assert "✗ dropped" in page

    before, after = read_captions(storage, "noisy", "split"), read_captions(storage, "clean", "split")
    kept = dict(zip(after.image_ids, after.captions, strict=True))
    scored = {row.image_id: row for row in scored_rows(storage / "capfilt" / "clean")}
    for image_id, captions, split in zip(before.image_ids, before.captions, before.splits, strict=True):
        expected = captions
        if split == "train":
            pairs = zip(captions, scored.pop(image_id).scores, strict=True)
            expected = [text for text, score in pairs if score >= summary["threshold"]]
        assert kept.pop(image_id, []) == expected
    assert (kept, scored) == ({}, {}), "an image twice, or one of nowhere"

    result = shuffled_captions.score(shuffled_captions.ScoreSettings(storage.uri, "clean"))
    assert (result["num_captions"], result["num_shuffled"], result["num_dropped"]) == (80, 20, 20)

    settings = CapfiltSettings(matcher, storage.uri, "clean", "noisy", "split", share=0.75, rows_per_block=7)
    assert capfilt(settings) == summary, "what is finished stays"
    with pytest.raises(InputError, match="clean is finished with other settings; give another name"):
        capfilt(dataclasses.replace(settings, share=0.5))
    # By the scores that are there.
    again = dataclasses.replace(settings, name="none", share=None, threshold=2.0, out=f"{storage}/capfilt/clean")
    with pytest.raises(InputError, match="no caption of an image that trains reaches the threshold 2"):
        capfilt(again)
    assert not (storage / "data" / "none").exists("_SUCCESS")
    assert capfilt(dataclasses.replace(again, threshold=-2.0))["num_kept"] == 80

    # By a Q-Former, with the threshold of BLIP.
    by_itm = dataclasses.replace(settings, matcher=tiny_matcher.write_qformer(tmp_path), name="itm", share=None)
    summary = capfilt(by_itm)
    assert (summary["score"], summary["threshold"], summary["settings"]["threshold"]) == ("probability", 0.5, 0.5)
    scores = [score for row in scored_rows(storage / "capfilt" / "itm") for score in row.scores]
    num_dropped = sum(score < 0.5 for score in scores)
    assert 0 < num_dropped < len(scores) == 80
    assert summary["num_dropped"] == num_dropped
    result = shuffled_captions.score(shuffled_captions.ScoreSettings(storage.uri, "itm"))
    assert (result["threshold"], result["num_dropped"], result["num_shuffled"]) == (0.5, num_dropped, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 0.5}, "--threshold and --share: give one of them"),
        ({"share": 1.5}, "--share 1.5: must be between 0 and 1"),
        ({"threshold": float("nan"), "share": None}, "--threshold nan: must be a finite number"),
        ({"action": "add"}, "--action add: needs --captioner"),
        ({"captioner": "run"}, "--captioner: has no effect with --action keep"),
        ({"captioner_encoder": "run"}, "--captioner-encoder: has no effect without --captioner"),
        ({"rows_per_block": 0}, "--rows-per-block 0: must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(change: dict[str, Any], message: str) -> None:
    settings = CapfiltSettings("run", "out", "new", share=0.5)
    with pytest.raises(InputError, match=message):
        dataclasses.replace(settings, **change).check()


def test_the_threshold_of_a_probability() -> None:
    settings = CapfiltSettings("run", "out", "new")
    assert settings.with_threshold(is_probability=True).threshold == 0.5
    for given in (dataclasses.replace(settings, share=0.7), dataclasses.replace(settings, threshold=0.9)):
        assert given.with_threshold(is_probability=True) == given
    with pytest.raises(InputError, match="--threshold and --share: give one of them"):
        settings.with_threshold(is_probability=False)
    log_odds = dataclasses.replace(settings, threshold=-1.5)
    assert log_odds.with_threshold(is_probability=False) == log_odds
    with pytest.raises(InputError, match=r"--threshold -1\.5: run gives the probability .* between 0 and 1"):
        log_odds.with_threshold(is_probability=True)


def test_bad_names(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tiny.write_dataset(storage)
    for name, message in (("A b", "use lower-case letters"), ("tiny", "give the new dataset a name of its own")):
        with pytest.raises(InputError, match=message):
            capfilt(CapfiltSettings(tiny_matcher.write_pair(tmp_path), storage.uri, name, "tiny", "split", share=0.5))


def test_moved_captions_go_to_other_images() -> None:
    owners = np.repeat(np.arange(10), 5)
    source = shuffled_captions.moved(owners, 0.3, seed=0)
    is_moved = source != np.arange(50)
    assert is_moved.sum() == 15
    assert sorted(source) == list(range(50)), "no caption is lost"
    assert (owners[source] != owners)[is_moved].all()
    assert (source == shuffled_captions.moved(owners, 0.3, seed=0)).all()
    assert (source != shuffled_captions.moved(owners, 0.3, seed=1)).any()
    with pytest.raises(InputError, match="give a larger --share or more images"):
        shuffled_captions.moved(np.array([0, 0, 0, 1]), 1.0, seed=0)


def test_detection_counts() -> None:
    found = shuffled_captions.detection(np.array([0.1, 0.2, 0.3, 0.3]), np.array([True, False, True, False]), 0.25)
    assert (found["precision"], found["recall"], found["auc"]) == (0.5, 0.5, (1 + 1 + 0 + 0.5) / 4)
