"""Karpathy's and COCO's JSON are read with their splits, or refused by the place in the document."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmcore.data.photos import Photos
from mmcore.data.predictions import read_predictions
from mmcore.data.references import read_references
from mmcore.data.sources import read_source
from mmcore.errors import InputError
from mmcore.metrics.matching import match_predictions


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (len(path.name), 90, 200)).save(path)


def read(folder: Path, skip_bad: bool = False) -> Photos:
    return read_source(str(folder), folder / "no such folder", skip_bad=skip_bad)


def found(data: Photos) -> list[tuple[str, tuple[str, ...], str]]:
    return [(photo.file_name, photo.captions, photo.split_karpathy) for photo in data.photos]


def karpathy(name: str, split: str | None = "train", *captions: str, **more: Any) -> dict[str, Any]:
    """An image as Karpathy's files have it."""
    sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": 0} for text in captions or ("x",)]
    return {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name, **more}


def write(path: Path, document: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


FLICKR = {"images": [karpathy(f"{split}.jpg", split, f"of {split} .") for split in ("train", "val", "test")]}


@pytest.mark.parametrize("images", ["Images", ".", "flickr8k/Flicker8k_Dataset"])
@pytest.mark.parametrize("document", ["dataset_flickr8k.json", "karpathy/mine.json"])
def test_karpathys_flickr8k_wherever_the_images_lie(tmp_path: Path, images: str, document: str) -> None:
    write(tmp_path / document, {**FLICKR, "dataset": "flickr8k"})
    for name in ("train", "val", "test", "without a caption"):
        image(tmp_path / images / f"{name}.jpg")
    data = read(tmp_path)
    assert found(data) == [
        ("train.jpg", ("of train .",), "train"),
        ("val.jpg", ("of val .",), "validation"),
        ("test.jpg", ("of test .",), "test"),
    ]
    assert data.form == "Karpathy's JSON"
    assert data.detail == f"{tmp_path / document}, images below {tmp_path}"
    assert len(data.notes) == 1
    assert data.notes[0].startswith(
        f"1 images below {tmp_path}, {Path(images) / 'without a caption.jpg'} the first, have"
    )


def test_karpathys_coco_trains_on_restval_and_knows_the_folders(tmp_path: Path) -> None:
    images = [
        karpathy("COCO_train2014_000000000009.jpg", "train", "A\n man ", filepath="train2014", cocoid=9),
        karpathy("COCO_val2014_000000000042.jpg", "restval", "A cat", "A cat , too", filepath="val2014", cocoid=42),
        karpathy("same.jpg", "val", "One", filepath="train2014", cocoid=43),
        karpathy("same.jpg", "test", "Other", filepath="val2014", cocoid=44),
    ]
    path = write(tmp_path / "annotations" / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for each in images:
        image(tmp_path / "images" / each["filepath"] / each["filename"])
    assert found(read(tmp_path)) == [
        ("COCO_train2014_000000000009.jpg", ("A man",), "train"),
        ("COCO_val2014_000000000042.jpg", ("A cat", "A cat , too"), "train"),
        ("train2014/same.jpg", ("One",), "validation"),
        ("val2014/same.jpg", ("Other",), "test"),
    ]
    # The file alone finds the images beside its folder, and is a file of references.
    assert found(read(path)) == found(read(tmp_path))
    assert read_references(str(path)).captions["COCO_val2014_000000000042"] == ["A cat", "A cat , too"]


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (karpathy("gone.jpg"), r"images\[1\]: missing image .*/gone\.jpg"),
        (karpathy("../a.jpg"), r"images\[1\]: the image name '\.\./a\.jpg' is not a plain file name"),
        (karpathy("a.jpg", "train", " "), r"images\[1\]: the row has no caption"),
        (karpathy("a.jpg", "train", "x\0"), r"images\[1\]: the caption holds a NUL character"),
        ({"filename": 1.5, "sentences": []}, r"images\[1\]: `filename` is no name of an image"),
        (
            {"filename": "b.jpg", "sentences": [{"raw": 3}]},
            r"images\[1\]: 'b.jpg': `sentences` is no list of objects with",
        ),
        ({"filename": "b.jpg", "sentences": "a dog"}, r"images\[1\]: 'b.jpg': `sentences` is no list of objects with"),
        ("b.jpg", r"images\[1\]: `filename` is no name of an image"),
        (karpathy("broken.jpg"), r"images\[1\]: .*broken\.jpg: broken image \(no image format is recognised\)"),
        (karpathy("a.jpg", "val"), r"images\[1\]: 'a\.jpg' is in the split 'train' from .*images\[0\] on"),
    ],
)
def test_what_is_wrong_in_karpathys_json_is_one_line_and_can_be_left_out(
    tmp_path: Path, broken: object, reason: str
) -> None:
    image(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    write(tmp_path / "dataset_mine.json", {"images": [karpathy("a.jpg"), broken]})
    with pytest.raises(InputError, match=rf"dataset_mine\.json: {reason}.*--skip-bad$") as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
    data = read(tmp_path, skip_bad=True)
    assert [photo.captions for photo in data.photos] == [("x",)]
    assert len(data.skipped) == 1


def test_a_split_that_is_not_known_is_said(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        image(tmp_path / name)
    images = [karpathy("a.jpg", "train"), karpathy("b.jpg", "val"), karpathy("c.jpg", "holdout")]
    write(tmp_path / "dataset.json", {"images": images})
    data = read(tmp_path)
    assert [photo.split_karpathy for photo in data.photos] == ["train", "validation", "unused"]
    assert data.notes == (
        "split 'holdout' is not known: its 1 images are `unused`; known are train, training, restval, "
        "validation, valid, val, dev, test, testing",
    )


def test_without_an_image_the_folder_of_both_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "dataset_flickr8k.json", FLICKR)
    with pytest.raises(InputError, match=r"dataset_flickr8k\.json found, and no image; put the images there, or give"):
        read(tmp_path)


# --- COCO --------------------------------------------------------------------------------------------------


def coco(*numbers: int) -> dict[str, Any]:
    """Two captions an image, those of all images in turn as COCO has them."""
    annotations = [
        {"image_id": number, "id": 10 * number + turn, "caption": f"caption {turn}\nof {number}"}
        for turn in range(2)
        for number in numbers
    ]
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "license": 1} for number in numbers]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations}


@pytest.mark.parametrize("images", ["", "images/"])
def test_coco_with_its_files_of_two_splits(tmp_path: Path, images: str) -> None:
    for split, numbers in (("train", (9, 25)), ("val", (139,))):
        write(tmp_path / "annotations" / f"captions_{split}2017.json", coco(*numbers))
        # Beside the captions lies what is none.
        write(tmp_path / "annotations" / f"instances_{split}2017.json", {"annotations": [{"image_id": 9}]})
        for number in numbers:
            image(tmp_path / f"{images}{split}2017" / f"{number:012d}.jpg")
    data = read(tmp_path)
    assert found(data) == [
        ("000000000009.jpg", ("caption 0 of 9", "caption 1 of 9"), "train"),
        ("000000000025.jpg", ("caption 0 of 25", "caption 1 of 25"), "train"),
        ("000000000139.jpg", ("caption 0 of 139", "caption 1 of 139"), "validation"),
    ]
    assert data.form == "COCO's captions"
    alone = read(tmp_path / "annotations" / "captions_train2017.json")
    assert found(alone) == [(name, captions, "unused") for name, captions, _ in found(data)[:2]]
    assert "all images of captions_train2017.json are of the split 'train': for several splits, put" in alone.notes[0]
    assert not any("several splits" in note for note in data.notes)
    # The captions of both splits lie in one zip, and the images of one were fetched.
    (tmp_path / f"{images}val2017" / f"{139:012d}.jpg").unlink()
    with pytest.raises(
        InputError, match=r"val2017\.json: not one of its 1 images, 0+139\.jpg .*; put them there, or give the"
    ):
        read(tmp_path)
    data = read(tmp_path, skip_bad=True)
    assert (found(data), len(data.skipped)) == (found(alone), 1)


def test_cocos_results_are_scored_by_its_numbers(tmp_path: Path) -> None:
    references = read_references(str(write(tmp_path / "captions_val2017.json", coco(139))))
    results = write(tmp_path / "results.json", [{"image_id": 139, "caption": "a room"}])
    predictions = read_predictions(str(results), references.image_ids)
    assert match_predictions(predictions, references) == {"000000000139": "a room"}


@pytest.mark.parametrize(
    ("key", "broken", "reason"),
    [
        ("annotations", {"image_id": 7, "caption": "x"}, r"annotations\[2\]: `image_id` 7 is no `id` of its images"),
        ("annotations", {"image_id": 9, "caption": None}, r"annotations\[2\]: `caption` is no text: None"),
        ("annotations", 3, r"annotations\[2\]: `image_id` None is no `id` of its images"),
        ("images", {"id": 9, "file_name": "b.jpg"}, r"images\[1\]: `id` 9 is that of images\[0\] too"),
        ("images", {"file_name": "b.jpg"}, r"images\[1\]: `id` and `file_name` do not name an image"),
    ],
)
def test_what_is_wrong_in_cocos_json_is_one_line_and_can_be_left_out(
    tmp_path: Path, key: str, broken: object, reason: str
) -> None:
    document = coco(9)
    document[key].append(broken)
    write(tmp_path / "captions_mine.json", document)
    image(tmp_path / "000000000009.jpg")
    with pytest.raises(InputError, match=rf"captions_mine\.json: {reason}; mend it"):
        read(tmp_path)
    data = read(tmp_path, skip_bad=True)
    assert [photo.captions for photo in data.photos] == [("caption 0 of 9", "caption 1 of 9")]
    assert len(data.skipped) == 1
