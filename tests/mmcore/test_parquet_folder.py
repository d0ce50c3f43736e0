"""Parquet files of a hub's dataset are read with the splits of their names."""

import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmcore.data.parquet_folder import files_by_split, parquet_files
from mmcore.data.photos import Photos
from mmcore.data.sources import read_source
from mmcore.errors import InputError


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def jpeg(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def table(*shades: int, image: pa.DataType | None = None) -> pa.Table:
    """Two rows with one caption each for an image of each shade."""
    kind = image or pa.struct({"bytes": pa.binary(), "path": pa.string()})
    values = [
        {"bytes": jpeg(shade), "path": f"{shade}.jpg"} if pa.types.is_struct(kind) else jpeg(shade) for shade in shades
    ]
    captions = [[f"caption of {shade}", "another"] for shade in shades]
    return pa.table({"image": pa.array(values, kind), "caption": captions})


def write(path: Path, content: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(content, path)


def read(folder: Path) -> Photos:
    pytest.importorskip("datasets", reason="the optional package `datasets` is not installed")
    return read_source(str(folder), folder.parent / "scratch")


@pytest.mark.parametrize("name", ["data/{}-00000-of-00001-0a1b.parquet", "{}/0000.parquet", "{}.parquet"])
def test_the_splits_of_the_names_are_ours(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "source"
    for shade, split in enumerate(("train", "validation", "test")):
        write(folder / name.format(split), table(shade, shade + 3))
    (folder / "README.md").write_text("a dataset")
    data = read(folder)
    found = {photo.file_name: photo.split_karpathy for photo in data.photos}
    splits = ["train", "validation", "test"]
    assert found == {f"{shade}.jpg": splits[shade % 3] for shade in range(6)}
    assert data.photos[0].captions == ("caption of 0", "another")
    assert data.form == "Hugging Face dataset in Parquet of 3 splits"


def test_plain_bytes_in_one_file_have_no_split(tmp_path: Path) -> None:
    write(tmp_path / "source" / "train.parquet", table(0, 1, image=pa.binary()))
    data = read(tmp_path / "source" / "train.parquet")
    assert [(photo.file_name, photo.split_karpathy) for photo in data.photos] == [
        ("train-000000.jpg", "unused"),
        ("train-000001.jpg", "unused"),
    ]


def test_a_split_by_an_unknown_name_keeps_it() -> None:
    paths = [
        Path(name) for name in ("a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "val.parquet", "0.parquet")
    ]
    assert files_by_split(paths) == {"a": paths[:2], "val": [paths[2]], "all": [paths[3]]}


def test_parquet_without_images_is_none(tmp_path: Path) -> None:
    pd.DataFrame({"key": ["0"], "caption": ["x"]}).to_parquet(tmp_path / "00000.parquet")
    pd.DataFrame({"image": ["a.jpg"], "caption": ["x"]}).to_parquet(tmp_path / "names.parquet")
    assert parquet_files(tmp_path) == []
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"broken\.parquet: broken Parquet"):
        parquet_files(tmp_path)
