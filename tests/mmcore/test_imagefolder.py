"""Hugging Face's imagefolder is read with its captions, sub-folders and splits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mmcore.data.photos import Photos
from mmcore.data.sources import read_source
from mmcore.errors import InputError


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (len(path.name), 90, 200)).save(path)


def read(folder: Path, skip_bad: bool = False) -> Photos:
    return read_source(str(folder), folder / "no such folder", skip_bad=skip_bad)


def test_json_lines_with_an_image_in_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "sub/a.jpg"):
        image(tmp_path / "train" / name)
    rows = [{"file_name": "b.png", "text": 'a box, "small"'}, {"file_name": "sub/a.jpg", "text": "a ball", "width": 4}]
    (tmp_path / "train" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read(tmp_path)
    found = [(photo.image_id, photo.file_name, photo.captions, photo.split_karpathy) for photo in data.photos]
    assert found == [
        ("b", "b.png", ('a box, "small"',), "unused"),
        ("sub-a", "sub/a.jpg", ("a ball",), "unused"),
    ]
    assert data.form == "Hugging Face's imagefolder"
    assert data.detail.startswith(f"{tmp_path}/train/metadata.jsonl (JSON lines, columns file_name and text")


@pytest.mark.parametrize("many", [True, False])
def test_folders_named_as_splits_are_the_splits(tmp_path: Path, many: bool) -> None:
    folders = {"train": "train", "val": "validation", "test": "test"}
    for folder in folders:
        image(tmp_path / folder / "a.png")
        if many:
            (tmp_path / folder / "metadata.csv").write_text(f'file_name,text\na.png,"of {folder}, one"\n')
    if not many:
        rows = "".join(f'{folder}/a.png,"of {folder}, one"\n' for folder in folders)
        (tmp_path / "metadata.csv").write_text("file_name,text\n" + rows)
    found = {photo.image_id: (photo.captions, photo.split_karpathy) for photo in read(tmp_path).photos}
    assert found == {f"{name}-a": ((f"of {name}, one",), split) for name, split in folders.items()}


def test_a_column_of_splits_counts_before_the_folders(tmp_path: Path) -> None:
    for name in ("train/a.png", "test/b.png"):
        image(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text,split\ntrain/a.png,x,test\ntest/b.png,y,train\n")
    assert [photo.split_karpathy for photo in read(tmp_path).photos] == ["test", "train"]


@pytest.mark.parametrize(
    ("rows", "line", "reason"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "c.png", "text": "y"}\n', 2, "missing image .*c.png"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png", "text": null}\n', 2, "text: expected text"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "../a.png", "text": "y"}\n', 2, "the image name .* plain"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"\n', 2, "broken JSON"),
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}\n', 2, "the columns are 'file_name'; none"),
    ],
)
def test_bad_rows_are_named_by_line_and_can_be_left_out(tmp_path: Path, rows: str, line: int, reason: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(rows)
    with pytest.raises(InputError, match=rf"metadata\.jsonl:{line}: {reason}"):
        read(tmp_path)
    data = read(tmp_path, skip_bad=True)
    assert [photo.captions for photo in data.photos] == [("x",)]
    assert len(data.skipped) == 1


def test_ids_are_names_without_their_ending(tmp_path: Path) -> None:
    for name in ("139.png", "285.png", "285.jpg"):
        image(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text('{"image_id": 139, "caption": "x"}\n{"image_id": "285", "caption": "y"}\n')
    data = read(tmp_path, skip_bad=True)
    assert [(photo.image_id, photo.file_name, photo.captions) for photo in data.photos] == [("139", "139.png", ("x",))]
    both = f"{tmp_path}/285.jpg and {tmp_path}/285.png"
    assert f"{tmp_path}/metadata.jsonl:2: '285' may be {both}; name the folder or the ending too" in data.skipped


def test_an_image_outside_of_the_metadata_is_no_secret(tmp_path: Path) -> None:
    image(tmp_path / "train" / "a.png")
    image(tmp_path / "test" / "b.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(InputError, match=r"test/b\.png: no caption for this image in metadata\.csv"):
        read(tmp_path)
