"""The images of bulk work: nested folders, shards of other tools, and broken, null, hidden or missing images."""

import csv
import dataclasses
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_caption_job import write_run

from jobs.caption import CaptionSettings, caption
from jobs.runtime.image_blocks import plan_blocks, read_block
from mmcore.errors import InputError
from mmcore.images import png_bytes
from mmcore.storage import Storage

pytest_plugins = ("sweep_fixtures",)

PNG = png_bytes(np.zeros((4, 4, 3), np.uint8))


def write_files(folder: Path, *names: str, data: bytes = PNG) -> Storage:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Storage(str(folder))


def write_shard(folder: Path, table: pa.Table, name: str = "a.parquet") -> Storage:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return write_files(folder, name, data=buffer.getvalue())


def read_all(source: Storage, **keywords: Any) -> dict[str, list[Any]]:
    read = [read_block(source, item) for item in plan_blocks(source, **keywords).items]
    return {name: [value for block in read for value in block[name]] for name in read[0]}


@pytest.mark.parametrize("on_s3", [False, pytest.param(True, marks=pytest.mark.process)])
def test_files_below_count_and_the_others_are_named(on_s3: bool, tmp_path, request, capsys) -> None:
    names = ["b.jpg", "a/1.jfif", "a/1/2.PNG", ".hidden.jpg", "._b.jpg", ".d/x.jpg", "a/.DS_Store", "a/1.heic", "x.txt"]
    source = write_files(tmp_path / "images", *names)
    (tmp_path / "images" / "round").symlink_to(tmp_path / "images", target_is_directory=True)
    if on_s3:
        source = Storage(request.getfixturevalue("s3_server")) / "images"
        for name in names:
            source.write(name, PNG)
    rows = read_all(source)
    assert rows["file_name"] == ["a/1.jfif", "a/1/2.PNG", "b.jpg"]
    assert rows["image_id"] == ["a/1", "a/1/2", "b"]
    assert rows["image"] == [PNG] * 3
    assert "2 files, no images by their endings (.heic 1, .txt 1)" in capsys.readouterr().out


def test_shards_come_first_at_the_top_and_last_below(tmp_path, capsys) -> None:
    table = pa.table({"image_id": ["s"], "image": [PNG]})
    source = write_shard(tmp_path, table, "below/b.parquet")
    assert read_all(source)["image_id"] == ["s"]
    assert capsys.readouterr().out == ""
    write_files(tmp_path, "c.png", "_SUCCESS")
    assert read_all(source)["image_id"] == ["c"]
    assert "(none 1, .parquet 1)" in capsys.readouterr().out
    write_shard(tmp_path, table)
    write_files(tmp_path, "._a.parquet", data=b"Mac OS X")
    assert read_all(source)["image_id"] == ["s"]
    assert "2 files, beside the Parquet shards (.parquet 1, .png 1)" in capsys.readouterr().out


STRUCT = pa.array([{"bytes": PNG, "path": "p.png"}, None, {"bytes": None, "path": "p.png"}])


@pytest.mark.parametrize(
    ("ids", "images"),
    [
        (pa.array([139, 285, 632]), STRUCT),
        (pa.array([139, 285, 632], pa.uint16()), pa.array([PNG, None, None], pa.large_binary())),
        (pa.array(["139", "285", "632"], pa.large_string()), pa.array([PNG, None, None], pa.binary())),
        (pa.array(["139", "285", "632"]).dictionary_encode(), pa.array([PNG, None, None]).dictionary_encode()),
        (pa.array([139, 285, 632]).dictionary_encode(), pa.array([PNG, None, None], pa.binary_view())),
    ],
)
def test_shards_of_others_are_read(ids: pa.Array, images: pa.Array, tmp_path) -> None:
    source = write_shard(tmp_path, pa.table({"image_id": ids, "image": images, "fold": [1, 2, 1]}))
    rows = read_all(source)
    assert rows == {
        "image_id": ["139", "285", "632"], "file_name": ["139", "285", "632"], "image": [PNG, None, None], "gone": [],
    }  # fmt: skip
    assert read_all(source, split="fold:1")["image_id"] == ["139", "632"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_id": [1.0], "image": [PNG]}, r"a.parquet: column 'image_id' is of type double; make it text or whole"),
        ({"image_id": ["a"], "image": ["a.png"]}, r"a.parquet: column 'image' is of type string; make it binary"),
        ({"image_id": ["a"], "image": [{"path": "x"}]}, r"column 'image' is of type struct<path: string>"),
        ({"image_id": ["a"], "image": [[1, 2]]}, r"column 'image' is of type list<"),
        ({"image_id": ["a"]}, r"a.parquet: no column 'image'; it has image_id"),
        ({"image_id": ["a", None], "image": [PNG, PNG]}, r"a.parquet: row 1 of row group 0 has no image_id"),
        ({"image_id": ["a", "a"], "image": [PNG, PNG]}, r"image_id 'a' stands there twice"),
        (None, r"a.parquet: broken Parquet"),
    ],
)
def test_other_shards_are_refused_by_their_column(columns: dict | None, message: str, tmp_path) -> None:
    if columns is None:
        source = write_files(tmp_path, "a.parquet", data=b"PAR1")
    else:
        source = write_shard(tmp_path, pa.table(columns))
    with pytest.raises(InputError, match=message) as raised:
        plan_blocks(source)
    assert "\n" not in str(raised.value)


def test_what_cannot_be_looked_at_is_not_left_out_in_silence(tmp_path, monkeypatch) -> None:
    source = write_files(tmp_path, "a.png", "b/c.png")
    (tmp_path / "b" / "d.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"b/d\.png: a link to a missing file; repair"):
        plan_blocks(source)
    (tmp_path / "b" / "d.png").unlink()
    scandir = os.scandir

    def closed(folder: str) -> Any:
        if str(folder).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/b'"):
        plan_blocks(source)


def test_two_files_of_one_name_are_both_named(tmp_path) -> None:
    with pytest.raises(InputError, match=r"image_id 'a/1' stands there twice \(a/1.jpg, a/1.png\)"):
        plan_blocks(write_files(tmp_path, "a/1.jpg", "a/1.png"))


@pytest.fixture
def settings(without_ray: None, tmp_path: Path) -> CaptionSettings:
    run = write_run(tmp_path / "runs" / "resnet_captioner" / "tiny")
    places = {"run": str(run), "images": str(tmp_path / "images"), "out": str(tmp_path / "out")}
    return CaptionSettings(**places, rows_per_block=2)


def listed(settings: CaptionSettings, name: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO((Path(settings.out) / name).read_text())))[1:]


def test_broken_and_null_images_are_skipped_and_listed(settings, tmp_path, capsys) -> None:
    # A block without good images, one with both kinds, one without bad images.
    images = pa.array([None, b"", PNG, PNG[:-30], PNG, PNG], pa.binary())
    write_shard(tmp_path / "images", pa.table({"image_id": list("abcdef"), "image": images}))
    with pytest.raises(InputError, match=r"images: a: no image there \(null\); mend it .* --skip-bad"):
        caption(settings)
    assert not (tmp_path / "out" / "captions.csv").exists()
    done = caption(dataclasses.replace(settings, skip_bad=True))
    assert (done["num_rows"], done["num_skipped"]) == (6, 3)
    assert [row[0] for row in listed(settings, "captions.csv")] == ["c", "e", "f"]
    bad = listed(settings, "skipped.csv")
    assert [row[0] for row in bad] == ["a", "b", "d"]
    for (_, reason), beginning in zip(
        bad, ("no image there (null)", "broken image (the", "broken image ("), strict=True
    ):
        assert reason.startswith(beginning)
    told = capsys.readouterr().out
    assert f"skipped: d: {bad[2][1]}" in told
    assert f"3 of 6 images skipped, all in {settings.out}/skipped.csv" in told


def test_rows_without_an_image_id_are_skipped_and_counted(settings, tmp_path, capsys) -> None:
    table = pa.table({"image_id": ["a", None, "c", None], "image": [PNG] * 4, "fold": ["1", "1", "2", "2"]})
    write_shard(tmp_path / "images", table)
    with pytest.raises(InputError, match=r"row 3 of row group 0 has no image_id; give it one, .* --skip-bad"):
        caption(dataclasses.replace(settings, split="fold:2"))
    done = caption(dataclasses.replace(settings, skip_bad=True))
    assert (done["num_rows"], done["num_skipped"]) == (2, 2)
    assert [row[0] for row in listed(settings, "captions.csv")] == ["a", "c"]
    assert listed(settings, "skipped.csv") == [
        [f"a.parquet: row {row} of row group 0", "no image_id"] for row in (1, 3)
    ]
    assert "2 of 4 images skipped" in capsys.readouterr().out
    write_shard(tmp_path / "images", table.slice(1, 1))
    with pytest.raises(InputError, match="hold no rows with an image_id"):
        plan_blocks(Storage(settings.images), skip_bad=True)


def test_a_sweep_goes_on_without_images_that_were_removed(settings, tmp_path, capsys) -> None:
    names = [f"{letter}.png" for letter in "abcdef"]
    source = write_files(tmp_path / "images", *names)
    source.write("d.png", PNG[:-30])
    with pytest.raises(InputError, match=r"images: d.png: broken image .* --skip-bad"):
        caption(settings)
    source.delete("d.png")
    caption(settings)
    kept = [name for name in names if name != "d.png"]
    assert [row[0] for row in listed(settings, "captions.csv")] == kept
    assert listed(settings, "skipped.csv") == [["d.png", "no longer there"]]
    assert "skipped: d.png: no longer there" in capsys.readouterr().out
    # Finished captions are kept.
    source.delete("a.png")
    caption(settings)
    assert [row[0] for row in listed(settings, "captions.csv")] == kept
    source.write("new.png", PNG)
    with pytest.raises(InputError, match=r"1 image files, new.png the first, were not there when the sweep began"):
        caption(settings)


def test_a_sweep_without_a_list_of_its_files_goes_on(settings, tmp_path) -> None:
    """As earlier versions wrote them: only the plan's digest identifies the images."""
    source, out = write_files(tmp_path / "images", "a.png", "b.png", "c.png"), Storage(settings.out)
    caption(settings)
    plan = json.loads(out.read("sweep.json"))
    assert plan.pop("files") == ["a.png", "b.png", "c.png"]
    out.write("sweep.json", json.dumps(plan).encode())
    (out / "parts").delete("part-000001.parquet")
    caption(settings)
    assert [row[0] for row in listed(settings, "captions.csv")] == ["a.png", "b.png", "c.png"]
    source.delete("c.png")
    with pytest.raises(InputError, match="num_rows was 3 and is now 2"):
        caption(settings)
