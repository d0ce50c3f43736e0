"""jobs/prepare.py with a Hugging Face dataset as its source: saved to disk here, as no hub is reachable."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.prepare import PrepareSettings, prepare
from mmcore.data.sources import read_source
from mmcore.errors import InputError


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).point(lambda value: (value + shade) % 256).save(buffer, "JPEG")
    return buffer.getvalue()


def settings(source: Path | str, storage: Path) -> PrepareSettings:
    return PrepareSettings(dataset="flickr8k", source=str(source), storage=str(storage))


def read(storage: Path, dataset: str = "flickr8k") -> list[dict[str, Any]]:
    return pq.read_table(storage / "data" / dataset).to_pylist()


@pytest.fixture
def saved_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`saved_dataset({"train": {"image": [...], ...}})` -> folder that save_to_disk wrote."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")

    def save(splits: dict[str, dict[str, list[Any]]], as_image: bool = True) -> Path:
        folder = tmp_path / "saved"
        made = {}
        for split, columns in splits.items():
            made[split] = datasets.Dataset.from_dict(columns)
            if as_image:
                made[split] = made[split].cast_column("image", datasets.Image(decode=False))
        whole = made["all"] if list(made) == ["all"] else datasets.DatasetDict(made)
        whole.save_to_disk(str(folder))
        return folder

    return save


@pytest.mark.usefixtures("ray_local")
def test_hugging_face_with_names_and_numbered_captions(saved_dataset: Callable[..., Path], tmp_path: Path) -> None:
    """The form of jxie/flickr8k, with file names out of order and a caption in quotation marks."""
    splits = {}
    names = {"train": ["c.jpg", "a.jpg"], "validation": ["d.jpg"], "test": ["b.jpg"]}
    for split, files in names.items():
        splits[split] = {
            "image": [{"bytes": jpeg(ord(name[0])), "path": name} for name in files],
            "caption_1": [f'"second" of "{name}"' for name in files],
            "caption_0": [f"first\nof {name}" for name in files],
        }
    prepare(settings(saved_dataset(splits), tmp_path / "out"))
    rows = read(tmp_path / "out")
    assert [row["file_name"] for row in rows] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
    assert [row["split_karpathy"] for row in rows] == ["train", "test", "train", "validation"]
    assert rows[0]["captions"] == ["first of a.jpg", '"second" of "a.jpg"']
    assert [row["image"] for row in rows] == [jpeg(ord(letter)) for letter in "abcd"]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(("column", "as_list"), [("captions", True), ("caption", True), ("text", False)])
def test_hugging_face_without_names(
    saved_dataset: Callable[..., Path], tmp_path: Path, column: str, as_list: bool
) -> None:
    images = [{"bytes": jpeg(shade), "path": None} for shade in range(3)]
    texts = [[f"caption {index}"] if as_list else f"caption {index}" for index in range(3)]
    folder = saved_dataset({"all": {"image": images, column: texts}})
    summary = prepare(PrepareSettings(dataset="mine", source=str(folder), storage=str(tmp_path / "out")))
    rows = read(tmp_path / "out", "mine")
    assert [row["image_id"] for row in rows] == [f"all-{index:06d}" for index in range(3)]
    assert [row["file_name"] for row in rows] == [f"all-{index:06d}.jpg" for index in range(3)]
    assert [row["captions"] for row in rows] == [[f"caption {index}"] for index in range(3)]
    assert [row["image"] for row in rows] == [jpeg(shade) for shade in range(3)]
    assert summary["splits"]["split_karpathy"] == {"unused": 3}


@pytest.mark.parametrize("names", [["b.jpg", "a.jpg", "b.jpg", "b.jpg"], [None] * 4])
def test_hugging_face_with_a_row_for_each_caption(
    saved_dataset: Callable[..., Path], tmp_path: Path, names: list[str | None]
) -> None:
    rows = [{"bytes": jpeg(shade), "path": name} for shade, name in zip([1, 2, 1, 1], names, strict=True)]
    folder = saved_dataset({"all": {"image": rows, "text": ["one", "two", "three", "four"]}})
    photos = read_source(str(folder), tmp_path).photos
    of_first = ("one", "three", "four")
    assert [photo.captions for photo in photos] == ([("two",), of_first] if names[0] else [of_first, ("two",)])
    assert [photo.image_id for photo in photos] == (["a", "b"] if names[0] else ["all-000000", "all-000001"])


@pytest.mark.usefixtures("ray_local")
def test_hugging_face_with_its_split_in_a_column(
    saved_dataset: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The form of nlphuji/flickr30k: one split `test`, Karpathy's in a column, file names in another."""
    wanted = ["train", "val", "test", "restval"]
    columns = {
        "image": [{"bytes": jpeg(shade), "path": None} for shade in range(4)],
        "caption": [["one", "two"]] * 4,
        "split": wanted,
        "filename": [f"{name}.jpg" for name in "dcba"],
        "sentids": [["0"]] * 4,
    }
    summary = prepare(settings(saved_dataset({"test": columns}), tmp_path / "out"))
    assert summary["splits"]["split_karpathy"] == {"test": 1, "validation": 1, "train": 2}
    split_of = {row["file_name"]: row["split_karpathy"] for row in read(tmp_path / "out")}
    assert split_of == {"a.jpg": "train", "b.jpg": "test", "c.jpg": "validation", "d.jpg": "train"}
    printed = capsys.readouterr().out
    assert "(4 rows; image and columns filename, caption and split; not read: sentids)" in printed


@pytest.mark.parametrize(("splits", "note"), [([0, 1], "split '0' is not known"), ([["train"]] * 2, "not known")])
def test_splits_that_are_no_names_are_said(
    saved_dataset: Callable[..., Path], tmp_path: Path, splits: list[Any], note: str
) -> None:
    rows = [{"bytes": jpeg(shade), "path": None} for shade in range(2)]
    folder = saved_dataset({"all": {"image": rows, "text": ["one", "two"], "split": splits}})
    photos = read_source(str(folder), tmp_path)
    assert {photo.split_karpathy for photo in photos.photos} == {"unused"}
    assert note in photos.notes[0]


@pytest.mark.usefixtures("saved_dataset")
def test_a_class_without_a_label_is_no_split(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "split": datasets.ClassLabel(names=["val", "test"]),
        }
    )
    rows = {"image": [{"bytes": jpeg(shade), "path": None} for shade in range(2)], "text": ["a", "b"], "split": [0, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    photos = read_source(str(tmp_path / "saved"), tmp_path).photos
    assert [photo.split_karpathy for photo in photos] == ["validation", "unused"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"photo": [1], "caption": ["x"]}, "no column `image`, only photo, caption"),
        ({"image": [b"x"], "words": ["x"]}, "'all': the columns are 'words'; none is known to hold its captions"),
        ({"image": [b"x"], "caption": [3]}, r"saved: all\[0\]: `caption` holds no text; mend it"),
        ({"image": ["a.jpg"], "caption": ["x"]}, r"saved: all\[0\]: `image` holds no encoded image"),
        ({"image": [b"x"], "caption": ["x"]}, r"saved: all\[0\]: all-000000\.jpg: broken image"),
    ],
)
def test_hugging_face_of_another_form(
    saved_dataset: Callable[..., Path], tmp_path: Path, columns: dict[str, list[Any]], reason: str
) -> None:
    folder = saved_dataset({"all": columns}, as_image=False)
    with pytest.raises(InputError, match=reason):
        prepare(settings(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_hugging_face_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'", name="datasets")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(InputError, match=r"^jxie/flickr8k: to read it .*: pip install datasets$"):
        prepare(settings("jxie/flickr8k", tmp_path / "out"))
