"""jobs/evaluate.py shapes and colours: it scores the images of a sweep by its manifest."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.evaluate import (
    ColourScoreSettings,
    PhotoScoreSettings,
    ShapesScoreSettings,
    evaluate_images,
    evaluate_photos,
)
from jobs.runtime.scores_line import colours_line
from mmcore.data.shapes import ShapesSettings
from mmcore.data.shapes_rows import shapes_row
from mmcore.errors import InputError
from mmcore.images import png_bytes

SETTINGS = {"steps": 25, "run": "/storage/runs/ldm/a", "weights_sha256": "of run a"}


def write_run(folder: Path, weights: str) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "recipe.json").write_text(json.dumps({"weights_sha256": weights}))
    return folder


def write_sweep(folder: Path, images: list[bytes], prompts: list[str], num_rows: int | None = None) -> str:
    """A sweep of two blocks in the form of jobs/generate.py."""
    (folder / "images").mkdir(parents=True)
    (folder / "manifest").mkdir()
    keys = [f"images/{index:06d}.png" for index in range(len(images))]
    for key, image in zip(keys, images, strict=True):
        (folder / key).write_bytes(image)
    digests = [hashlib.sha256(image).hexdigest() for image in images]
    table = pa.table({"key": keys, "sha256": digests, "prompt": prompts}).replace_schema_metadata({"block": "{}"})
    half = len(images) // 2
    for k, part in enumerate((table[:half], table[half:])):
        pq.write_table(part, folder / "manifest" / f"part-{k:06d}.parquet")
    plan = {"num_rows": len(images) if num_rows is None else num_rows, "settings": SETTINGS}
    (folder / "sweep.json").write_text(json.dumps(plan))
    return str(folder)


def shapes_sweep(folder: Path, **more: Any) -> str:
    rows = [shapes_row(ShapesSettings(num_test=12), "test", index) for index in range(12)]
    return write_sweep(folder, [row["image"] for row in rows], [row["captions"][0] for row in rows], **more)


def test_shapes_are_scored_and_written_into_the_runs_storage(tmp_path: Path, run_job: Any) -> None:
    sweep = shapes_sweep(tmp_path / "sweep")
    run = write_run(tmp_path / "runs" / "ldm" / "a", "of run a")
    result = run_job("jobs/evaluate.py", "shapes", "--sweep", sweep, "--run", run)
    scores = json.loads(result.stdout)
    assert scores["all"]["fraction_correct"] > 0.98
    assert scores["shuffled"]["fraction_correct"] < 0.6
    assert (scores["num_images"], scores["settings"], scores["sweep"]) == (12, SETTINGS, sweep)
    written = tmp_path / "scores" / "ldm" / "a.json"
    assert json.loads(written.read_text()) == scores
    where, told = result.stderr.splitlines()
    assert where == f"scores written to {written}"
    assert told.startswith(f"{scores['all']['fraction_correct']:.1%} of the attributes that the prompts of 12 images")


def test_colours_are_scored(tmp_path: Path) -> None:
    colours = [("pink", (250, 150, 190)), ("black", (20, 20, 20)), ("green", (40, 130, 40))] * 4
    images = [png_bytes(np.full((8, 8, 3), rgb, np.uint8)) for _, rgb in colours]
    sweep = write_sweep(tmp_path / "sweep", images, [f"a girl in {name} dress" for name, _ in colours])
    scores = evaluate_images(ColourScoreSettings(sweep))
    assert scores["fraction_correct"] == 1
    assert colours_line(scores) == "100.0% of 12 images lean towards the colour that is named; chance 33.3%"
    assert {name: each["num_images"] for name, each in scores["colours"].items()} == {"pink": 4, "black": 4, "green": 4}
    with pytest.raises(InputError, match="no prompt names red"):
        evaluate_images(ColourScoreSettings(sweep, colours=("pink", "black", "green", "red")))


def test_what_is_not_the_sweep_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="12 of 13 images are there"):
        evaluate_images(ShapesScoreSettings(shapes_sweep(tmp_path / "part", num_rows=13)))
    with pytest.raises(InputError, match="no sweep of images there"):
        evaluate_images(ShapesScoreSettings(str(tmp_path / "nowhere")))
    changed = shapes_sweep(tmp_path / "changed")
    path = Path(changed) / "images" / "000007.png"
    image = np.zeros((64, 64, 3), np.uint8)
    path.write_bytes(png_bytes(image))
    with pytest.raises(InputError, match=r"000007.png: is not the image that the manifest names"):
        evaluate_images(ShapesScoreSettings(changed))
    path.unlink()
    with pytest.raises(InputError, match=r"000007.png: is in the manifest and not there"):
        evaluate_images(ShapesScoreSettings(changed))


def test_scores_are_filed_under_the_run_that_made_the_images(tmp_path: Path) -> None:
    sweep = shapes_sweep(tmp_path / "sweep")
    other = write_run(tmp_path / "runs" / "ldm" / "b", "of run b")
    unfinished = tmp_path / "runs" / "ldm" / "c"
    unfinished.mkdir()
    (unfinished / "recipe.json").write_text("{}")
    for run in (other, unfinished):
        with pytest.raises(InputError, match=rf"--run {run}: its weights did not .* those of /storage/runs/ldm/a did"):
            evaluate_images(ShapesScoreSettings(sweep, run=str(run)))
    assert not (tmp_path / "scores").exists()


def test_scores_of_another_sweep_are_not_overwritten(tmp_path: Path) -> None:
    run = str(write_run(tmp_path / "runs" / "ldm" / "a", "of run a"))
    first, second = shapes_sweep(tmp_path / "first"), shapes_sweep(tmp_path / "second")
    evaluate_images(ShapesScoreSettings(first, run=run))
    scores = tmp_path / "scores" / "ldm" / "a.json"
    before = scores.read_bytes()
    with pytest.raises(
        InputError, match=rf"a.json: holds the scores of {first}, which those of {second} would replace"
    ):
        evaluate_images(ShapesScoreSettings(second, run=run))
    assert scores.read_bytes() == before
    evaluate_images(ShapesScoreSettings(first, run=run))


def test_the_datasets_own_photos_are_scored(tmp_path: Path) -> None:
    """Only captions with the word and exactly one of the colours are counted."""
    red, green, grey = (np.full((8, 8, 3), rgb, np.uint8) for rgb in ((250, 20, 20), (20, 130, 20), (128, 128, 128)))
    rows = [
        (red, ["a red dog", "an animal"]),
        (green, ["a dog in green grass", "a dog"]),
        (green, ["a red dog", "a dog in green grass"]),  # both colours
        (green, ["a red house", "a dog"]),  # the colour is not next to the word
        (grey, ["a greenish dog"]),
    ]
    folder = tmp_path / "data" / "photos"
    folder.mkdir(parents=True)
    table = {
        "image_id": [str(number) for number in range(len(rows))],
        "image": [png_bytes(image) for image, _ in rows],
        "captions": [captions for _, captions in rows],
    }
    pq.write_table(pa.table(table), folder / "part-00000.parquet")
    (folder / "_SUCCESS").write_text("{}")
    settings = PhotoScoreSettings(str(tmp_path), "photos", ("red", "green"), word="dog", image_size=8)
    scores = evaluate_photos(settings)
    assert (scores["num_images"], scores["fraction_correct"], scores["word"]) == (2, 1, "dog")
    without_word = evaluate_photos(dataclasses.replace(settings, word=None))
    assert without_word["num_images"] == 3
    with pytest.raises(InputError, match="no prompt names"):
        evaluate_photos(dataclasses.replace(settings, word="cat"))
