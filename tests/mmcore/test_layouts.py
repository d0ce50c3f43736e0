"""What people's folders look like when nobody told them how: read as it is meant, or refused by a line that helps."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmcore.data.photos import Photos, photo_row
from mmcore.data.sources import read_source
from mmcore.errors import InputError
from mmcore.images import decode_image


def image(path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (len(path.name), 90, 200)).save(path, **options)  # type: ignore[arg-type]


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def read(folder: Path, skip_bad: bool = False) -> Photos:
    return read_source(str(folder), folder / "no such folder", skip_bad=skip_bad)


def captions_of(data: Photos) -> dict[str, tuple[str, ...]]:
    return {photo.file_name: photo.captions for photo in data.photos}


CSV = "image,caption\na.jpg,one\nb.jpg,two\n"
JSON_LINES = '{"image": "a.jpg", "caption": "one"}\n{"image": "b.jpg", "caption": "two"}\n'
NAMES = ("a.jpg", "b.jpg")
# The file of captions and its content; where the images lie.
READ: dict[str, tuple[str, str | bytes, tuple[str, str]]] = {
    "Kaggle's Flickr8k": ("captions.txt", CSV, ("Images/a.jpg", "Images/b.jpg")),
    "an image in a folder of its class": ("captions.csv", CSV, ("images/cats/a.jpg", "images/dogs/b.jpg")),
    "semicolons of a spreadsheet": ("captions.csv", CSV.replace(",", ";"), NAMES),
    "tabs": ("captions.tsv", CSV.replace(",", "\t"), NAMES),
    "a byte order mark and CR LF": ("captions.csv", b"\xef\xbb\xbf" + CSV.replace("\n", "\r\n").encode(), NAMES),
    "JSON lines": ("captions.jsonl", JSON_LINES, NAMES),
    "JSON by names": ("captions.json", '{"a.jpg": "one", "b.jpg": ["two"]}', NAMES),
    "a name of one's own": ("labels.csv", CSV, ("photos/a.jpg", "photos/b.jpg")),
}


@pytest.mark.parametrize("case", READ)
def test_a_layout_is_read(tmp_path: Path, case: str) -> None:
    captions, content, images = READ[case]
    for each in images:
        image(tmp_path / each)
    write(tmp_path / captions, content)
    assert captions_of(read(tmp_path)) == {"a.jpg": ("one",), "b.jpg": ("two",)}


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in NAMES:
        image(tmp_path / name)
    for name in ("captions.csv", ".DS_Store", "README.txt", "notes.md"):
        write(tmp_path / name, CSV if name == "captions.csv" else "of mine")
    assert read(tmp_path).detail.endswith("; not read: README.txt, notes.md")
    for number in range(5):
        write(tmp_path / f"z{number}.log", "")
    assert read(tmp_path).detail.endswith("README.txt, notes.md, z0.log, z1.log, z2.log and 2 more")


def test_images_behind_a_link_are_found_and_a_circle_ends(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        image(tmp_path / "elsewhere" / "deep" / name)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "source")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "photos").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "source" / "captions.csv", CSV)
    assert captions_of(read(tmp_path / "source")) == {"a.jpg": ("one",), "b.jpg": ("two",)}


@pytest.mark.parametrize(
    ("named", "lies", "called"),
    [
        ("a.jpg", "images/A.JPG", "A.JPG"),
        ("a", "images/a.JPEG", "a.JPEG"),
        ("images\\a.jpg", "images/a.jpg", "images/a.jpg"),
        ("./sub/a.jpg", "images/sub/a.jpg", "sub/a.jpg"),
    ],
)
def test_a_name_is_that_of_the_file(tmp_path: Path, named: str, lies: str, called: str) -> None:
    image(tmp_path / lies)
    image(tmp_path / "images" / "b.jpg")
    write(tmp_path / "captions.csv", CSV.replace("a.jpg", named))
    assert captions_of(read(tmp_path)) == {called: ("one",), "b.jpg": ("two",)}


def test_the_tar_that_a_folder_was_unpacked_from_is_passed_over(tmp_path: Path) -> None:
    for name in NAMES:
        image(tmp_path / "images" / name)
    write(tmp_path / "captions.csv", CSV)
    write(tmp_path / "download.tar.gz", b"whatever")
    assert captions_of(read(tmp_path)) == {"a.jpg": ("one",), "b.jpg": ("two",)}


def test_a_file_of_captions_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        image(tmp_path / "images" / f"{split}.jpg")
        write(tmp_path / f"my_{split}.csv", f"image,caption\n{split}.jpg,of {split}\n")
    data = read(tmp_path)
    assert captions_of(data) == {f"{split}.jpg": (f"of {split}",) for split in ("test", "train", "val")}
    assert [photo.split_karpathy for photo in data.photos] == ["test", "train", "validation"]


@pytest.mark.parametrize("split", [True, False])
def test_a_text_beside_each_image(tmp_path: Path, split: bool) -> None:
    folders = ("train", "val") if split else ("10_dog", "more")
    for folder, name in zip(folders, NAMES, strict=True):
        image(tmp_path / folder / name)
        write(tmp_path / folder / name.replace(".jpg", ".txt"), f"of {name}, red\r\n\r\n")
    data = read(tmp_path)
    assert captions_of(data) == {f"{folders[0]}/a.jpg": ("of a.jpg, red",), f"{folders[1]}/b.jpg": ("of b.jpg, red",)}
    wanted = ["train", "validation"] if split else ["unused", "unused"]
    assert [photo.split_karpathy for photo in data.photos] == wanted
    image(tmp_path / "c.png")
    with pytest.raises(InputError, match=r"c\.png: no caption for this image in c\.txt beside it; mend it, or leave"):
        read(tmp_path)
    write(tmp_path / "c.txt", "x")
    write(tmp_path / "c.png", "no image")
    with pytest.raises(InputError, match=rf"^{tmp_path}/c\.png: broken image \(no image format is recognised\); mend"):
        read(tmp_path)
    write(tmp_path / "c.txt", " ")
    with pytest.raises(InputError, match=r"c\.txt: the file holds no caption"):
        read(tmp_path)
    assert len(read(tmp_path, skip_bad=True).photos) == 2


def test_images_of_every_kind_keep_their_bytes_and_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, Callable[[], Image.Image]] = {
        "turned.jpg": lambda: Image.new("RGB", (4, 3)),
        "cmyk.jpg": lambda: Image.new("CMYK", (4, 3)),
        "alpha.webp": lambda: Image.new("RGBA", (4, 3)),
        "palette.gif": lambda: Image.new("P", (4, 3)),
        "grey.PNG": lambda: Image.new("L", (4, 3)),
    }
    for name, make in kinds.items():
        buffer = io.BytesIO()
        options = {"exif": exif} if name == "turned.jpg" else {}
        make().save(buffer, {"jpg": "JPEG"}.get(name[-3:], name.rpartition(".")[2]), **options)
        write(tmp_path / "images" / name, buffer.getvalue())
    write(tmp_path / "captions.csv", "image,caption\n" + "".join(f"{name},x\n" for name in kinds))
    rows = [photo_row(photo) for photo in read(tmp_path).photos]
    assert [row["image"] for row in rows] == [(tmp_path / "images" / name).read_bytes() for name in kinds]
    sizes = {row["file_name"]: decode_image(row["image"], name="x").size for row in rows}
    assert sizes == {name: (3, 4) if name == "turned.jpg" else (4, 3) for name in kinds}


@pytest.mark.parametrize("name", ["a.jpg", "flickr8k.rar", "flickr8k.zip", "flickr8k"])
def test_a_file_of_another_kind_is_sent_to_its_folder(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"<html>not found</html>")
    with pytest.raises(InputError, match=rf"^--source {tmp_path / name}: no zip, tar or file of captions .* folder"):
        read(tmp_path / name)


def test_of_several_files_of_captions_in_a_zip_one_can_be_given_only_outside_of_it(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / "data" / name / "captions.csv", CSV)
    shutil.make_archive(str(tmp_path / "d"), "zip", tmp_path / "data")
    with pytest.raises(
        InputError, match=rf"^{tmp_path}/d\.zip: .*; unpack it and give the right one, such as one/captions\.csv, or "
    ):
        read_source(str(tmp_path / "d.zip"), tmp_path)


BAD: dict[str, tuple[dict[str, str | bytes], str]] = {
    "one name in two folders": (
        {"captions.csv": CSV, "images/cats/a.jpg": b"", "images/dogs/a.jpg": b"", "images/b.jpg": b""},
        r"captions\.csv:2: 'a\.jpg' may be .*cats/a\.jpg and .*dogs/a\.jpg; name the folder or the ending too",
    ),
    "a path of another machine": (
        {"captions.csv": "image,caption\n/home/me/a.jpg,one\n", "a.jpg": b""},
        r"captions\.csv:2: the image name '/home/me/a\.jpg' is not a plain file name, or a path in the folder",
    ),
    "a path of another Windows": (
        {"captions.csv": "image,caption\nC:\\me\\a.jpg,one\n", "a.jpg": b""},
        r"captions\.csv:2: the image name .* is not a plain file name",
    ),
    "a spreadsheet": (
        {"captions.xlsx": b"PK", "a.jpg": b"", "b.jpg": b""},
        r"no captions of a known form in it \(\.jpg 2, \.xlsx 1\); known are captions\.txt",
    ),
    "folders of classes": ({"cats/a.jpg": b"", "dogs/b.jpg": b""}, r"no captions of a known form in it \(\.jpg 2\)"),
    "Unicode of a spreadsheet": (
        {"captions.csv": CSV.encode("utf-16"), "a.jpg": b""},
        "is not UTF-8; save the file as",
    ),
    "Windows' code page": (
        {"captions.csv": b"image,caption\na.jpg,it\x92s\n", "a.jpg": b""},
        r"csv:2: byte 0x92 is not",
    ),
    "two files": (
        {"one.csv": CSV, "train.csv": CSV, "a.jpg": b"", "b.jpg": b""},
        r"one\.csv and train\.csv may hold the captions; give the right one as --source, or call it captions\.txt",
    ),
    "other columns": (
        {"captions.csv": "photo,label\na.jpg,one\n", "a.jpg": b""},
        r"captions\.csv:1: the columns are 'photo', 'label'; none is known to hold the image .* rename",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_layout_that_is_not_read_is_refused_by_a_line_that_helps(tmp_path: Path, case: str) -> None:
    files, reason = BAD[case]
    for name, content in files.items():
        if content == b"":
            image(tmp_path / name)
        else:
            write(tmp_path / name, content)
    with pytest.raises(InputError, match=reason) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)
