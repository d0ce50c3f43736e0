"""Flickr8k, or any folder of photographs in its form, read and checked in full before anything is written.

The form: ``captions.txt`` with a row ``image,caption`` for each caption; the images in ``Images/`` or beside
captions.txt; optionally the official split, ``Flickr_8k.{train,dev,test}Images.txt``, in ``splits/``, in
``Flickr8k_text/`` or beside captions.txt. All this may lie one folder deeper.

``captions.txt`` is CSV: the first comma ends the file name, and a caption with a comma in it stands in
quotation marks (2,540 of the 40,455), which are no part of the caption.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES, decode_image

CAPTIONS_FILE = "captions.txt"
IMAGES_FOLDER = "Images"
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
SPLIT_FOLDERS = ("splits", ".", "Flickr8k_text")
SPLIT_COLUMNS = ("split_report", "split_report_generation", "split_karpathy")
UNUSED = "unused"


@dataclass(frozen=True)
class Source:
    """Where the parts of a Flickr8k folder lie; `splits` is empty where the official split is not there."""

    captions: Path
    images: Path
    splits: dict[str, Path]


@dataclass(frozen=True)
class Photo:
    """One image before its bytes are read: `path` is its file, `num_bytes` that file's size when checked."""

    image_id: str
    file_name: str
    captions: tuple[str, ...]
    split_report: str
    split_report_generation: str
    split_karpathy: str
    path: str
    num_bytes: int


@dataclass(frozen=True)
class Flickr8k:
    """The photos in the order of captions.txt, what was left out and why, and whether a split was found."""

    photos: tuple[Photo, ...]
    skipped: tuple[str, ...]
    has_official_split: bool


@dataclass
class _Entry:
    """An image and its captions as captions.txt has them; `line` is that of its first caption."""

    file_name: str
    line: int
    captions: list[str] = field(default_factory=list)

    @property
    def image_id(self) -> str:
        return Path(self.file_name).stem


class _Problems:
    """What is wrong with a source: the first problem is raised, or all are listed with `skip_bad`."""

    def __init__(self, folder: Path, label: str, skip_bad: bool) -> None:
        self.folder = folder
        self.label = label
        self.skip_bad = skip_bad
        self.skipped: list[str] = []

    def place(self, path: Path, line: int | None = None) -> str:
        """`path` as the user knows it: within the zip or data set that was unpacked, where there was one."""
        shown = os.path.normpath(os.path.join(self.label, os.path.relpath(path, self.folder)))
        return shown if line is None else f"{shown}:{line}"

    def add(self, place: str, reason: str) -> None:
        if not self.skip_bad:
            raise InputError(f"{place}: {reason}; mend it, or leave it out with --skip-bad")
        self.skipped.append(f"{place}: {reason}")


def split_caption_row(line: str) -> tuple[str, str] | None:
    """File name and caption of one row of captions.txt, or None where the row has no comma.

    The first comma splits. A caption in quotation marks loses them, and each doubled mark in it becomes one.
    """
    name, comma, caption = line.partition(",")
    if not comma:
        return None
    caption = caption.strip()
    inside = caption[1:-1]
    # A caption that merely begins and ends with a quoted word, `"a" or "b"`, is not a quoted field.
    if len(caption) >= 2 and caption[0] == caption[-1] == '"' and '"' not in inside.replace('""', ""):
        caption = inside.replace('""', '"').strip()
    return name.strip(), caption


def report_splits(num_images: int) -> tuple[int, int]:
    """How many images, from the first, train in the report's captioning and in its generation protocol.

    6,472 and 7,000 of the 8,091 images of Flickr8k; for any other number the same parts of it.
    """
    return int(num_images * 0.8), round(num_images * 7000 / 8091)


def find_source(folder: Path, *, label: str | None = None) -> Source:
    """Find captions, images and splits in `folder` or one folder deeper. Raises InputError."""
    label = label or str(folder)
    if (folder / CAPTIONS_FILE).is_file():
        base = folder
    else:
        inside = sorted(path.parent for path in folder.glob(f"*/{CAPTIONS_FILE}") if path.is_file())
        if not inside:
            reason = f"no {CAPTIONS_FILE} in it" if any(folder.iterdir()) else "the folder is empty"
            raise InputError(f"{label}: {reason}; it should hold {CAPTIONS_FILE} and {IMAGES_FOLDER}/")
        if len(inside) > 1:
            names = ", ".join(path.name for path in inside)
            raise InputError(f"{label}: {CAPTIONS_FILE} is in several folders ({names}); give one of them")
        base = inside[0]
    images = base / IMAGES_FOLDER
    splits: dict[str, Path] = {}
    for split, name in SPLIT_FILES.items():
        for place in SPLIT_FOLDERS:
            if (base / place / name).is_file():
                splits[split] = base / place / name
                break
    return Source(base / CAPTIONS_FILE, images if images.is_dir() else base, splits)


def read_flickr8k(
    folder: Path,
    *,
    label: str | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Flickr8k:
    """Read and check a source: every row, every split, and every image decoded to its last byte.

    `label` stands for `folder` in messages, where that was unpacked from something else. `skip_bad` goes on
    without what is bad and lists it. `progress(done, total)` counts checked images. The splits of the report
    are counted over the images that are left. Raises InputError at the first problem.
    """
    source = find_source(folder, label=label)
    problems = _Problems(folder, label or str(folder), skip_bad)
    entries = _read_captions(source, problems)
    karpathy = _read_splits(source, {entry.file_name for entry in entries}, problems)
    _find_uncaptioned(source, {entry.file_name for entry in entries}, problems)
    checked = _check_images(source, entries, problems, progress)
    if not checked:
        raise InputError(f"{problems.place(source.captions)}: not one image with a caption is left")
    num_train, num_generation_train = report_splits(len(checked))
    photos = tuple(
        Photo(
            image_id=entry.image_id,
            file_name=entry.file_name,
            captions=tuple(entry.captions),
            split_report="train" if index < num_train else "validation",
            split_report_generation="train" if index < num_generation_train else "test",
            split_karpathy=karpathy.get(entry.file_name, UNUSED),
            path=str((source.images / entry.file_name).absolute()),
            num_bytes=num_bytes,
        )
        for index, (entry, num_bytes) in enumerate(checked)
    )
    return Flickr8k(photos, tuple(problems.skipped), bool(source.splits))


def photo_row(photo: Photo) -> dict[str, Any]:
    """The row of the prepared dataset, image bytes as they are in the file. Raises InputError."""
    data = Path(photo.path).read_bytes()
    if len(data) != photo.num_bytes:
        raise InputError(f"{photo.path}: was {photo.num_bytes} bytes when checked and is {len(data)} now; run again")
    return {
        "image_id": photo.image_id,
        "file_name": photo.file_name,
        "image": data,
        "captions": list(photo.captions),
        **{column: getattr(photo, column) for column in SPLIT_COLUMNS},
    }


def _read_lines(path: Path, problems: _Problems) -> list[tuple[int, str]]:
    """Number, from 1, and text of the lines that are not blank."""
    lines: list[tuple[int, str]] = []
    # Not str.splitlines: that also breaks lines at characters which a caption may hold.
    for number, raw in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            problems.add(problems.place(path, number), "not UTF-8 text")
            continue
        if text:
            lines.append((number, text))
    return lines


def _read_captions(source: Source, problems: _Problems) -> list[_Entry]:
    """One entry an image, in file order."""
    entries: list[_Entry] = []
    by_name: dict[str, _Entry] = {}
    by_id: dict[str, _Entry] = {}
    rows = _read_lines(source.captions, problems)
    if rows and rows[0][1].replace(" ", "").lower() == "image,caption":
        rows = rows[1:]
    for line, text in rows:
        place = problems.place(source.captions, line)
        row = split_caption_row(text)
        if row is None:
            problems.add(place, f"caption row without a comma: {text[:60]!r}")
            continue
        name, caption = row
        if not name or not caption:
            problems.add(place, f"the row has no {'caption' if name else 'image name'}")
        elif PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name == "..":
            problems.add(place, f"the image name {name!r} is not a plain file name")
        elif entries and entries[-1].file_name == name:
            entries[-1].captions.append(caption)
        elif name in by_name:
            problems.add(place, f"duplicate id: {name!r} had its captions from line {by_name[name].line} on")
        elif Path(name).stem in by_id:
            other = by_id[Path(name).stem]
            problems.add(place, f"duplicate id: {name!r} and {other.file_name!r} of line {other.line}")
        else:
            entry = _Entry(name, line, [caption])
            entries.append(entry)
            by_name[name] = by_id[entry.image_id] = entry
    if not entries:
        raise InputError(f"{problems.place(source.captions)}: no caption in it; a row is `image,caption`")
    return entries


def _read_splits(source: Source, known: set[str], problems: _Problems) -> dict[str, str]:
    """File name to official split; empty where the source has no split files."""
    if source.splits and len(source.splits) < len(SPLIT_FILES):
        missing = [name for split, name in SPLIT_FILES.items() if split not in source.splits]
        present = next(iter(source.splits.values()))
        problems.add(problems.place(present), f"{' and '.join(missing)} should stand beside it")
    split_of: dict[str, str] = {}
    for split, path in source.splits.items():
        for line, name in _read_lines(path, problems):
            place = problems.place(path, line)
            if name not in known:
                problems.add(place, f"unknown id {name!r}, not an image of {CAPTIONS_FILE}")
            elif name in split_of:
                problems.add(place, f"{name!r} is already in the {split_of[name]} split")
            else:
                split_of[name] = split
    return split_of


def _find_uncaptioned(source: Source, known: set[str], problems: _Problems) -> None:
    for path in sorted(source.images.iterdir()):
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        if is_image and path.name not in known:
            problems.add(problems.place(path), f"no caption for this image in {CAPTIONS_FILE}")


def _check_images(
    source: Source,
    entries: list[_Entry],
    problems: _Problems,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[_Entry, int]]:
    """The entries whose image decodes, each with the size of its file in bytes."""

    def check(entry: _Entry) -> tuple[int, str, str]:
        """Size; or where and what is wrong."""
        path = source.images / entry.file_name
        place = problems.place(source.captions, entry.line)
        if not path.is_file():
            return 0, place, f"missing image {problems.place(path)}"
        data = path.read_bytes()
        try:
            decode_image(data, name=problems.place(path))
        except InputError as error:
            return 0, place, str(error)
        return len(data), place, ""

    checked: list[tuple[_Entry, int]] = []
    # Threads are enough: Pillow lets other threads run while it decodes.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for done, (entry, (num_bytes, place, reason)) in enumerate(
            zip(entries, pool.map(check, entries), strict=True), 1
        ):
            if reason:
                problems.add(place, reason)
            else:
                checked.append((entry, num_bytes))
            if progress is not None:
                progress(done, len(entries))
    finally:
        pool.shutdown(cancel_futures=True)
    return checked
