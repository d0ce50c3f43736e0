"""Tar shards are read as webdataset has them, whatever stands in them, and nothing of them lands outside."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from PIL import Image

from mmcore.data.photos import Photos, photo_row
from mmcore.data.sources import read_source
from mmcore.data.webdataset import expand_braces
from mmcore.errors import InputError
from mmcore.storage import Storage


def jpeg(shade: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (shade, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def shard(path: Path, members: Iterable[tuple[str, bytes | str]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read(source: Path | str, scratch: Path, skip_bad: bool = False) -> Photos:
    return read_source(str(source), scratch / "scratch", skip_bad=skip_bad)


def found(data: Photos) -> list[tuple[str, tuple[str, ...], str]]:
    return [(photo.file_name, photo.captions, photo.split_karpathy) for photo in data.photos]


SAMPLES = [
    ("./000000000.jpg", jpeg(0)),
    ("./000000000.json", json.dumps({"caption": "of JSON", "url": "x", "width": 4})),
    ("./000000000.txt", "of text\r\n"),
    ("./sub/b.png", jpeg(1)),
    ("./sub/b.json", json.dumps({"captions": ["one", " two\nlines "]})),
    ("./sub/b.cls", "3"),
    ("./._000000000.jpg", b"x"),
]
READ = [("000000000.jpg", ("of text",), "unused"), ("sub/b.png", ("one", "two lines"), "unused")]


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar", "w:xz")])
def test_a_shard_is_read_in_order_with_its_bytes(tmp_path: Path, name: str, mode: str) -> None:
    path = shard(tmp_path / "shards" / name, SAMPLES, mode)
    data = read(path, tmp_path)
    assert found(data) == READ
    assert [photo_row(photo)["image"] for photo in data.photos] == [jpeg(0), jpeg(1)]
    assert (data.form, data.detail) == ("webdataset of 1 shard", str(path))
    assert found(read(path.parent, tmp_path / "folder")) == READ


def test_shards_of_an_object_store_are_read_alike(tmp_path: Path, s3_server: str) -> None:
    path = shard(tmp_path / "a.tar", SAMPLES)
    Storage(s3_server).write("shards/a-0.tar", path.read_bytes())
    assert found(read(f"{s3_server}/shards/a-{{0..0}}.tar", tmp_path)) == READ
    with pytest.raises(InputError, match=r"a-1\.tar: no such file"):
        read(f"{s3_server}/shards/a-{{0..1}}.tar", tmp_path / "gone")


@pytest.mark.parametrize("names", ["{train,val,test}/{0..1}.tar", "flickr-{train,val,test}-{00..01}.tar"])
def test_shards_of_splits_whose_names_repeat(tmp_path: Path, names: str) -> None:
    pattern = str(tmp_path / "shards" / names)
    for path in expand_braces(pattern):
        shard(Path(path), [("0.jpg", jpeg()), ("0.txt", "one\ntwo\n")])
    data = read(pattern, tmp_path)
    assert [photo.split_karpathy for photo in data.photos] == [
        *["train", "train", "validation", "validation", "test", "test"]
    ]
    assert {photo.captions for photo in data.photos} == {("one", "two")}
    assert data.photos[1].file_name == ("train/1/0.jpg" if "/{0" in names else "flickr-train-01/0.jpg")
    assert sorted(found(read(tmp_path / "shards", tmp_path / "folder"))) == sorted(found(data))


def link(name: str, kind: bytes) -> Callable[[Path], None]:
    def add(path: Path) -> None:
        with tarfile.open(path, "a") as archive:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)

    return add


def member(name: str, content: bytes | str) -> Callable[[Path], object]:
    return lambda path: shard(path, [(name, content)], "a")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "outside": (member("../evil.txt", "x"), r": member '\.\./evil\.txt' leads outside the folder"),
    "absolute": (member("/tmp/mmcore-evil.jpg", jpeg()), ": member '/tmp/mmcore-evil.jpg' has an absolute path"),
    "windows": (member("..\\evil.jpg", jpeg()), ": member .* has a Windows path"),
    "symbolic link": (link("c.jpg", tarfile.SYMTYPE), r": member 'c\.jpg' is a link"),
    "hard link": (link("c.jpg", tarfile.LNKTYPE), r": member 'c\.jpg' is a link"),
    "device": (link("c.jpg", tarfile.CHRTYPE), r": member 'c\.jpg' is no plain file"),
    "twice": (member("sub/b.png", jpeg()), r": member 'sub/b\.png' is a second image of 'sub/b', beside 'sub/b\.png'"),
    "one id": (member("sub-b.jpg", jpeg()), r": duplicate id: members 'sub-b\.jpg' and 'sub/b\.png'"),
    "long name": (member("c" * 250 + ".jpg", jpeg()), r": member 'c+\.\.\.' has a name of more than 200 bytes"),
    "no image": (member("c.txt", "x"), r": c: no image \(\.jpg, .*\) beside txt"),
    "no caption": (member("c.jpg", jpeg()), r": c: no caption beside 'c\.jpg': a \.txt or \.json of its name"),
    "broken image": (lambda path: shard(path, [("c.jpg", "x"), ("c.txt", "x")], "a"), r": c: .*c\.jpg: broken image"),
    "empty text": (lambda path: shard(path, [("c.jpg", jpeg()), ("c.txt", "\n")], "a"), r": c: \.txt holds no text"),
    "not utf-8": (lambda path: shard(path, [("c.jpg", jpeg()), ("c.txt", b"\xff")], "a"), r": c: \.txt: byte 0 is not"),
    "NUL": (lambda path: shard(path, [("c.jpg", jpeg()), ("c.txt", "x\0")], "a"), ": c: the caption holds a NUL"),
    "broken JSON": (lambda path: shard(path, [("c.jpg", jpeg()), ("c.json", "{")], "a"), r": c: \.json: broken JSON"),
    "deep JSON": (lambda path: shard(path, [("c.jpg", jpeg()), ("c.json", "[" * 10**5)], "a"), "nested too deeply"),
    "null": (
        lambda path: shard(path, [("c.jpg", jpeg()), ("c.json", '{"caption": null}')], "a"),
        r"\.json holds no text",
    ),
    "other JSON": (
        lambda path: shard(path, [("c.jpg", jpeg()), ("c.json", '{"words": "x"}')], "a"),
        ": c: the columns are 'words'; none is known to hold its captions",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_in_a_shard_is_one_line_and_can_be_left_out(tmp_path: Path, case: str) -> None:
    break_it, reason = BAD[case]
    path = shard(tmp_path / "a.tar", SAMPLES)
    break_it(path)
    with pytest.raises(InputError, match=rf"a\.tar.*{reason}.*--skip-bad$"):
        read(path, tmp_path / "strict")
    data = read(path, tmp_path / "lenient", skip_bad=True)
    assert found(data) == READ
    assert data.skipped
    assert not list(tmp_path.rglob("*evil*"))
    assert not Path("/tmp/mmcore-evil.jpg").exists()


def test_a_shard_that_is_cut_short_keeps_what_is_whole(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", SAMPLES)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(jpeg(1)) + 100])
    with pytest.raises(InputError, match=r"a\.tar: not a whole tar \(.*\); download it again"):
        read(path, tmp_path / "strict")
    assert found(read(path, tmp_path / "lenient", skip_bad=True)) == READ[:1]


def test_a_shard_that_is_missing_can_be_left_out(tmp_path: Path) -> None:
    shard(tmp_path / "a-1.tar", SAMPLES)
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/a-0\.tar: no such file; mend it, or leave it out with --skip-bad"
    ):
        read(tmp_path / "a-{0..1}.tar", tmp_path / "strict")
    data = read(tmp_path / "a-{0..1}.tar", tmp_path / "lenient", skip_bad=True)
    assert (found(data), data.skipped) == (READ, (f"{tmp_path}/a-0.tar: no such file",))


def test_a_tar_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "flickr.tar", [("captions.csv", "image,caption\na.jpg,x\n")])
    with pytest.raises(
        InputError, match=r"flickr\.tar: no sample of an image and a \.txt or \.json .* give its folder"
    ):
        read(path, tmp_path)
    path.write_bytes(b"no tar")
    with pytest.raises(InputError, match=r"flickr\.tar: not a whole tar"):
        read(path, tmp_path / "none")
    with pytest.raises(InputError, match=r"no-such\.tar: no such file"):
        read(tmp_path / "no-such.tar", tmp_path / "gone")


def test_braces() -> None:
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("s-{008..011}.tar") == ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]
    assert expand_braces("{a,b}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    for pattern in ("{0..3.tar", "0..3}.tar", "{3..0}.tar", "{a}.tar", "{0..999999999}.tar", "{0..999}{0..999}.tar"):
        with pytest.raises(InputError, match=r"^--source "):
            expand_braces(pattern)
