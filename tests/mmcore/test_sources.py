"""A source is read correctly, or refused in one line that names the file and the line."""

import io
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmcore.data.archive import unpack_zip
from mmcore.data.caption_folder import SPLIT_FILES
from mmcore.data.caption_text import find_layout
from mmcore.data.photos import SPLIT_COLUMNS, Photos, Progress, photo_row, report_splits
from mmcore.data.sources import read_source
from mmcore.errors import InputError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "flickr8k"
NAMES = ("a.jpg", "b.jpg", "c.jpg")


def jpeg(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).point(lambda value: (value + shade) % 256).save(buffer, "JPEG")
    return buffer.getvalue()


def make_source(folder: Path) -> Path:
    """Three images; captions.txt: line 1 the header, a.jpg on 2 and 3, b.jpg on 4 and 5, c.jpg on 6 and 7."""
    (folder / "Images").mkdir(parents=True)
    for shade, name in enumerate(NAMES):
        (folder / "Images" / name).write_bytes(jpeg(40 * shade))
    rows = [f"{name},caption {index} of {name}" for name in NAMES for index in range(2)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *rows]) + "\n")
    (folder / "splits").mkdir()
    for file, name in zip(SPLIT_FILES.values(), NAMES, strict=True):
        (folder / "splits" / file).write_text(f"{name}\n")
    return folder


def read(folder: Path, skip_bad: bool = False, progress: Progress | None = None) -> Photos:
    """A folder is read in place, so that nothing is unpacked."""
    return read_source(str(folder), folder / "no such folder", skip_bad=skip_bad, progress=progress)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_source(tmp_path / "flickr")


def edit(path: Path, line: int, text: str | None) -> None:
    """Replace `line`, counted from 1, or drop it; a line past the end is added."""
    lines = path.read_text().splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.jpg,A dog .", ("a.jpg", "A dog .")),
        ("a.jpg,A dog , a cat", ("a.jpg", "A dog , a cat")),
        ('a.jpg,"A dog , a cat ."', ("a.jpg", "A dog , a cat .")),
        ('a.jpg,"a "" sale "" sign ."', ("a.jpg", 'a " sale " sign .')),
        ('a.jpg,"a" or "b"', ("a.jpg", '"a" or "b"')),
        ('a.jpg,"half quoted', ("a.jpg", '"half quoted')),
        (" a.jpg , A dog ", ("a.jpg", "A dog")),
        ("a.jpg,", ("a.jpg", "")),
        ('a.jpg,"', ("a.jpg", '"')),
        ("a.jpg A dog", None),
    ],
)
def test_first_comma_splits_and_csv_quotes_go(line: str, expected: tuple[str, str] | None) -> None:
    fields = find_layout([line], "captions.txt").fields(line)
    assert fields == (None if expected is None else list(expected))


def test_report_splits_of_flickr8k_and_of_other_sizes() -> None:
    assert report_splits(8091) == (6472, 7000)
    assert report_splits(10) == (8, 9)
    assert report_splits(1) == (0, 1)


def test_rows_keep_order_bytes_captions_and_splits(source: Path) -> None:
    data = read(source)
    assert data.skipped == ()
    assert data.notes == ()
    assert data.form == "a file of captions"
    assert data.detail == (
        f"{source}/captions.txt (columns image and caption, comma between columns), images in {source}/Images, "
        "split of Flickr_8k.trainImages.txt ..."
    )
    rows = [photo_row(photo) for photo in data.photos]
    assert [row["image_id"] for row in rows] == ["a", "b", "c"]
    assert [row["file_name"] for row in rows] == list(NAMES)
    assert [row["captions"] for row in rows] == [[f"caption {i} of {name}" for i in range(2)] for name in NAMES]
    assert [row["image"] for row in rows] == [(source / "Images" / name).read_bytes() for name in NAMES]
    assert [row["split_report"] for row in rows] == ["train", "train", "validation"]
    assert [row["split_report_generation"] for row in rows] == ["train", "train", "train"]
    assert [row["split_karpathy"] for row in rows] == ["train", "validation", "test"]


def test_order_is_that_of_captions_and_not_of_names(source: Path) -> None:
    (source / "captions.txt").write_text("b.jpg,one\nc.jpg,two\na.jpg,three\n")  # and no header
    assert [photo.file_name for photo in read(source).photos] == ["b.jpg", "c.jpg", "a.jpg"]


@pytest.mark.parametrize("place", ["splits", ".", "Flickr8k_text"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_every_layout_is_found(tmp_path: Path, place: str, beside: bool, nested: bool) -> None:
    outer = tmp_path / "download"
    folder = make_source(outer / "Flickr8k" if nested else outer)
    (folder / place).mkdir(exist_ok=True)
    for name in SPLIT_FILES.values():
        (folder / "splits" / name).rename(folder / place / name)
    if beside:
        for name in NAMES:
            (folder / "Images" / name).rename(folder / name)
        (folder / "Images").rmdir()
    data = read(outer)
    assert [photo.split_karpathy for photo in data.photos] == ["train", "validation", "test"]
    assert [photo_row(photo)["image"] for photo in data.photos] == [jpeg(40 * shade) for shade in range(3)]


@pytest.mark.parametrize("captions", ["Flickr8k_text/Flickr8k.token.txt", "Flickr8k/Flickr8k_text/Flickr8k.token.txt"])
@pytest.mark.parametrize("images", ["Flicker8k_Dataset", "Flicker8k_Dataset/Flicker8k_Dataset", "photos"])
def test_the_folders_of_the_first_distribution(tmp_path: Path, captions: str, images: str) -> None:
    """Captions numbered behind the name, the split beside them, the images in a folder beside theirs."""
    folder = make_source(tmp_path / "made")
    text = tmp_path / "source" / captions
    text.parent.mkdir(parents=True)
    names = ("a.jpg", "b.jpg", "c.jpg.1")  # one image of Flickr8k has this name
    text.write_text("".join(f"{name}#{index}\tcaption {index} , of it\n" for name in names for index in range(2)))
    # A lower-cased, stemmed copy is beside it, and human judgements, which are not captions.
    (text.parent / "Flickr8k.lemma.token.txt").write_text("a.jpg#0\tcaption of it\n")
    (text.parent / "ExpertAnnotations.txt").write_text("a.jpg\tb.jpg#2\t1\t1\t2\n")
    for name in SPLIT_FILES.values():
        (folder / "splits" / name).rename(text.parent / name)
    (text.parent.parent / images).parent.mkdir(exist_ok=True)
    (folder / "Images").rename(text.parent.parent / images)
    photos = read(tmp_path / "source").photos
    assert [photo.file_name for photo in photos] == list(NAMES)
    assert {photo.captions for photo in photos} == {("caption 0 , of it", "caption 1 , of it")}
    assert [photo.split_karpathy for photo in photos] == ["train", "validation", "test"]


def test_without_split_files_all_are_unused(source: Path) -> None:
    for name in SPLIT_FILES.values():
        (source / "splits" / name).unlink()
    data = read(source)
    assert data.notes == ("no official split (split files, or a column `split`): split_karpathy is `unused` for all",)
    assert {photo.split_karpathy for photo in data.photos} == {"unused"}


def test_windows_line_ends_byte_order_mark_and_odd_characters(source: Path) -> None:
    text = "image,caption\r\na.jpg,one\u2028line\r\n\r\nb.jpg,zwei Hündchen\r\nc.jpg,drei\r\n"
    (source / "captions.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    captions = [photo.captions for photo in read(source).photos]
    assert captions == [("one\u2028line",), ("zwei Hündchen",), ("drei",)]


def test_clutter_of_the_desktop_is_no_image(source: Path) -> None:
    (source / "Images" / ".DS_Store").write_bytes(b"x")
    (source / "Images" / "._a.jpg").write_bytes(b"x")
    (source / "Images" / "notes.txt").write_bytes(b"x")
    assert len(read(source).photos) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


TRAIN, DEV, TEST = SPLIT_FILES.values()
# The change to the source; the place in the message; its text; the images that --skip-bad keeps; their captions.
BAD: dict[str, tuple[Callable[[Path], object], str, str, str, int]] = {
    "missing image": (
        lambda s: (s / "Images/b.jpg").unlink(),
        "captions.txt:4",
        "missing image .*Images/b.jpg",
        "ac",
        4,
    ),
    "truncated jpeg": (
        lambda s: truncate(s / "Images/b.jpg"),
        "captions.txt:4",
        r"Images/b\.jpg: broken image",
        "ac",
        4,
    ),
    "empty image file": (
        lambda s: (s / "Images/c.jpg").write_bytes(b""),
        "captions.txt:6",
        r"Images/c\.jpg: broken image \(the file is empty\)",
        "ab",
        4,
    ),
    "row without a comma": (
        lambda s: edit(s / "captions.txt", 3, "a.jpg no comma here"),
        "captions.txt:3",
        "expected `image,caption`, got 'a.jpg no comma here'",
        "abc",
        5,
    ),
    "row without a caption": (
        lambda s: edit(s / "captions.txt", 3, "a.jpg, "),
        "captions.txt:3",
        "no caption",
        "abc",
        5,
    ),
    "row without an image name": (
        lambda s: edit(s / "captions.txt", 5, ",somebody"),
        "captions.txt:5",
        "no image name",
        "abc",
        5,
    ),
    "image name with a path": (
        lambda s: edit(s / "captions.txt", 5, "../b.jpg,x"),
        "captions.txt:5",
        "not a plain file name",
        "abc",
        5,
    ),
    "image name with a windows path": (
        lambda s: edit(s / "captions.txt", 5, "..\\b.jpg,x"),
        "captions.txt:5",
        "not a plain file name",
        "abc",
        5,
    ),
    "not utf-8": (
        lambda s: (s / "captions.txt").write_bytes((s / "captions.txt").read_bytes() + b"c.jpg,\xff\n"),
        "captions.txt:8",
        "not UTF-8",
        "abc",
        6,
    ),
    "unknown id in a split": (
        lambda s: edit(s / "splits" / DEV, 2, "zebra.jpg"),
        f"splits/{DEV}:2",
        "unknown id 'zebra.jpg'",
        "abc",
        6,
    ),
    "id in two splits": (
        lambda s: edit(s / "splits" / TEST, 2, "a.jpg"),
        f"splits/{TEST}:2",
        "'a.jpg' is already in the train split",
        "abc",
        6,
    ),
    "one split file missing": (
        lambda s: (s / "splits" / TEST).unlink(),
        f"splits/{TRAIN}",
        f"{TEST} should stand beside it",
        "abc",
        6,
    ),
    "two files of one stem": (
        lambda s: edit(s / "captions.txt", 8, "a.png,the same id"),
        "captions.txt:8",
        "duplicate id: 'a.png' and 'a.jpg' of line 2",
        "abc",
        6,
    ),
    "image without a caption": (
        lambda s: (s / "Images/d.jpg").write_bytes(jpeg()),
        "Images/d.jpg",
        "no caption for this image",
        "abc",
        6,
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_names_the_place(source: Path, case: str) -> None:
    break_it, place, reason, kept, num_captions = BAD[case]
    break_it(source)
    with pytest.raises(InputError, match=reason) as caught:
        read(source)
    message = str(caught.value)
    assert message.startswith(f"{source}/{place}: ")
    assert "\n" not in message
    assert message.endswith("--skip-bad")

    data = read(source, skip_bad=True)
    assert "".join(photo.image_id for photo in data.photos) == kept
    assert sum(len(photo.captions) for photo in data.photos) == num_captions
    assert data.skipped[0] == message.removesuffix("; mend it, or leave it out with --skip-bad")


def test_skip_bad_goes_past_all_of_them_at_once(source: Path) -> None:
    edit(source / "captions.txt", 2, "no comma")
    truncate(source / "Images/b.jpg")
    edit(source / "splits" / DEV, 2, "zebra.jpg")
    data = read(source, skip_bad=True)
    captions = [photo.captions for photo in data.photos]
    assert captions == [("caption 1 of a.jpg",), ("caption 0 of c.jpg", "caption 1 of c.jpg")]
    assert len(data.skipped) == 3
    # Counted over the two remaining ones.
    assert [photo.split_report for photo in data.photos] == ["train", "validation"]


@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda s: [path.unlink() for path in (s / "Images").iterdir()], r"missing image|not one image"),
        (lambda s: (s / "captions.txt").write_text("image,caption\n"), r"captions\.txt: no caption in it"),
        (lambda s: (s / "captions.txt").write_text(""), r"captions\.txt: no caption in it"),
        (lambda s: (s / "captions.txt").rename(s / "captions.doc"), r"flickr: no captions of a known form in it"),
    ],
)
def test_nothing_left_is_an_error_even_with_skip_bad(
    source: Path, break_it: Callable[[Path], object], reason: str, skip_bad: bool
) -> None:
    break_it(source)
    with pytest.raises(InputError, match=reason):
        read(source, skip_bad=skip_bad)


def test_empty_and_ambiguous_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the folder is empty"):
        read(tmp_path)
    one = make_source(tmp_path / "one")
    make_source(tmp_path / "two")
    with pytest.raises(InputError, match=r"may be read by any of one/captions\.txt, two/captions\.txt; give"):
        read(tmp_path)
    (one / "metadata.csv").write_text("file_name,text\nImages/a.jpg,x\n")
    with pytest.raises(InputError, match=r"may be read by any of metadata\.csv, captions\.txt; give"):
        read(one)


def test_a_file_of_captions_is_a_source_too(source: Path) -> None:
    assert [photo.file_name for photo in read(source / "captions.txt").photos] == list(NAMES)
    (source / "dataset.json").write_text('{"images": [{"filename": "a.jpg", "sentences": [{"raw": "of JSON"}]}]}')
    with pytest.raises(
        InputError, match=r"may be read by any of dataset\.json \(with splits\), captions\.txt; give .*/dataset\.json"
    ):
        read(source)
    assert len(read(source / "captions.txt").photos) == 3
    assert read(source / "dataset.json").photos[0].captions == ("of JSON",)


def test_captions_of_one_image_in_several_places_are_joined(source: Path) -> None:
    edit(source / "captions.txt", 8, "a.jpg,once more")
    data = read(source)
    assert data.photos[0].captions == ("caption 0 of a.jpg", "caption 1 of a.jpg", "once more")
    assert data.notes == ("the captions of 1 images, a.jpg the first, stand in several places: joined",)


def test_image_that_changes_after_the_check_is_refused(source: Path) -> None:
    photo = read(source).photos[0]
    truncate(Path(photo.path))
    with pytest.raises(InputError, match=r"a\.jpg: was \d+ bytes when checked"):
        photo_row(photo)


def test_progress_counts_every_image(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    read(source, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- zips --------------------------------------------------------------------------------------------------


def zip_folder(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


def add_member(path: Path, name: str, mode: int = 0) -> None:
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = name
        info.external_attr = mode << 16
        archive.writestr(info, b"evil")


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_zip_unpacks_to_the_same_files(source: Path, tmp_path: Path) -> None:
    path = zip_folder(source, tmp_path / "flickr.zip")
    add_member(path, "__MACOSX/Images/._a.jpg")
    out = tmp_path / "out"
    assert unpack_zip(path, out) == []
    assert files_below(out) == files_below(source)
    for name in files_below(source):
        assert (out / name).read_bytes() == (source / name).read_bytes()


EVIL: dict[str, tuple[str, int, str]] = {
    "parent": ("../evil.txt", 0, "leads outside"),
    "parent further in": ("Images/../../evil.txt", 0, "leads outside"),
    "absolute": ("/tmp/mmcore-evil.txt", 0, "absolute path"),
    "windows drive": ("C:evil.txt", 0, "Windows path"),
    "windows parent": ("..\\evil.txt", 0, "Windows path"),
    "symbolic link": ("Images/link.jpg", stat.S_IFLNK | 0o777, "is a link"),
    "device": ("Images/null.jpg", stat.S_IFCHR | 0o666, "no plain file"),
    "twice": ("Images/a.jpg", 0, "occurs twice"),
    "file and folder": ("captions.txt/evil.txt", 0, "both a file and a folder"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", EVIL)
def test_evil_member_is_refused_and_lands_nowhere(source: Path, tmp_path: Path, case: str) -> None:
    name, mode, reason = EVIL[case]
    path = zip_folder(source, tmp_path / "flickr.zip")
    add_member(path, name, mode=mode)
    before = files_below(tmp_path)
    with pytest.raises(InputError, match=reason) as caught:
        unpack_zip(path, tmp_path / "strict")
    assert str(caught.value).startswith(f"{path}: member {name!r} ")
    if case != "file and folder":  # all names are checked before the first byte is written
        assert files_below(tmp_path) == before
    assert not Path("/tmp/mmcore-evil.txt").exists()

    skipped = unpack_zip(path, tmp_path / "lenient", skip_bad=True)
    assert len(skipped) == 1
    assert files_below(tmp_path / "lenient") == files_below(source)
    assert not (tmp_path / "evil.txt").exists()
    assert not Path("/tmp/mmcore-evil.txt").exists()


def test_damaged_member_is_named(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "flickr.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in files_below(source):
            archive.write(source / name, name)
    data = path.read_bytes()
    wanted = (source / "Images/b.jpg").read_bytes()
    at = data.index(wanted) + len(wanted) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    with pytest.raises(InputError, match=r"member 'Images/b\.jpg' is damaged \(Bad CRC-32"):
        unpack_zip(path, tmp_path / "strict")
    assert len(unpack_zip(path, tmp_path / "lenient", skip_bad=True)) == 1
    assert not (tmp_path / "lenient/Images/b.jpg").exists()


def test_zip_that_is_none_or_cut_short_or_too_large(source: Path, tmp_path: Path) -> None:
    path = zip_folder(source, tmp_path / "flickr.zip")
    with pytest.raises(InputError, match=r"unpacks to [\d,]+ bytes, more than the 1,000 allowed"):
        unpack_zip(path, tmp_path / "large", max_bytes=1000, skip_bad=True)
    assert not (tmp_path / "large").exists()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"flickr\.zip: not a readable zip"):
        unpack_zip(path, tmp_path / "cut", skip_bad=True)
    path.write_text("hello")
    with pytest.raises(InputError, match=r"flickr\.zip: not a readable zip"):
        unpack_zip(path, tmp_path / "none", skip_bad=True)


def test_bomb_that_lies_about_its_size_stops_at_what_it_said(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("captions.txt", b"\0" * 5_000_000)
    data = path.read_bytes()
    size = (5_000_000).to_bytes(4, "little")
    assert data.count(size) == 2  # the local header and the central directory
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    with pytest.raises(InputError, match="is damaged"):
        unpack_zip(path, tmp_path / "out")
    assert files_below(tmp_path / "out") == []


# --- the real thing ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="the real Flickr8k is not on this machine")
def test_real_flickr8k() -> None:
    data = read(REAL)
    assert len(data.photos) == 8091
    captions = [caption for photo in data.photos for caption in photo.captions]
    assert len(captions) == 40455
    assert not any(caption.startswith('"') and caption.endswith('"') for caption in captions)
    counts = {column: Counter(getattr(photo, column) for photo in data.photos) for column in SPLIT_COLUMNS}
    assert counts == {
        "split_report": {"train": 6472, "validation": 1619},
        "split_report_generation": {"train": 7000, "test": 1091},
        "split_karpathy": {"train": 6000, "validation": 1000, "test": 1000, "unused": 91},
    }
    # From report-facts, on both protocols: 813 test images of karpathy are training images in the other one.
    both = [photo for photo in data.photos if photo.split_karpathy == "test" and photo.split_report == "train"]
    assert len(both) == 813
