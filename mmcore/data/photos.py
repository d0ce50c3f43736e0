"""Captioned photographs of any source, checked in full before anything is written.

What a reader of one format yields is an `Entry` an image; what jobs/prepare.py writes is a `Photo` an image.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from mmcore.data.caption_row import CaptionRow
from mmcore.data.image_folder import ImageFolder, is_image_file
from mmcore.data.splits import SPLIT_NAMES, UNUSED, known_split
from mmcore.errors import InputError
from mmcore.images import decode_image

SPLIT_COLUMNS = ("split_report", "split_report_generation", "split_karpathy")
Progress = Callable[[int, int], None]


class Problems:
    """What is wrong with a source: the first problem is raised, or all are listed with `skip_bad`."""

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.notes: list[str] = []
        """What is no problem, and a user should know."""

    def add(self, place: str, reason: str, *, mend: str = "mend it") -> None:
        """Raises InputError without `skip_bad`."""
        if not self.skip_bad:
            raise InputError(f"{place}: {reason}; {mend}, or leave it out with --skip-bad")
        self.skipped.append(f"{place}: {reason}")


@dataclass
class Entry:
    """An image as its source has it: `file_name` among the source's images, `path` its file, `place` its first row.

    `split` is the source's own name of it, None where it has none.
    """

    file_name: str
    place: str
    path: Path
    captions: list[str] = field(default_factory=list)
    split: str | None = None

    @property
    def image_id(self) -> str:
        return name_to_id(self.file_name)


@dataclass(frozen=True)
class Found:
    """What a reader found: the format's name, where it lies and how it was read in words, and an entry an image."""

    form: str
    detail: str
    entries: list[Entry]


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
class Photos:
    """The photos in the order of the source, and what it was read as: `form` and `detail` as in `Found`.

    `skipped` says what was left out and why, `notes` what else a user should know.
    """

    form: str
    detail: str
    photos: tuple[Photo, ...]
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def name_to_id(file_name: str) -> str:
    """`sub/dog.jpg` -> `sub-dog`: an image_id is one file name, without an ending."""
    return PurePosixPath(file_name).with_suffix("").as_posix().replace("/", "-")


def posix_name(name: str) -> str:
    """The name of an image as a path: ``a\\b.jpg`` of Windows -> ``a/b.jpg``."""
    return PurePosixPath(name.replace("\\", "/")).as_posix()


def report_splits(num_images: int) -> tuple[int, int]:
    """How many images, from the first, train in the report's captioning and in its generation protocol.

    6,472 and 7,000 of the 8,091 images of Flickr8k; for any other number the same parts of it.
    """
    return int(num_images * 0.8), round(num_images * 7000 / 8091)


def entries_of(rows: Iterable[CaptionRow], images: ImageFolder, problems: Problems) -> list[Entry]:
    """One entry for each image that `rows` name, its file looked for in `images`; the order is that of first rows."""
    entries: list[Entry] = []
    by_name: dict[str, Entry] = {}
    by_id: dict[str, Entry] = {}
    joined: dict[str, None] = {}
    for row in rows:
        captions = [caption for caption in row.captions if caption.strip()]
        called = posix_name(row.image)
        if not row.image or not captions:
            problems.add(row.place, f"the row has no {'caption' if row.image else 'image name'}")
            continue
        if PurePosixPath(called).is_absolute() or PureWindowsPath(called).drive or ".." in PurePosixPath(called).parts:
            problems.add(row.place, f"the image name {row.image!r} is not a plain file name, or a path in the folder")
            continue
        found = images.find(called)
        if len(found) > 1:
            several = " and ".join(map(str, found[:2]))
            problems.add(row.place, f"{row.image!r} may be {several}; name the folder or the ending too")
            continue
        path = found[0] if found else images.folder / called
        name = images.name_of(path, called) if found else called
        other = by_id.get(name_to_id(name))
        if name in by_name and by_name[name].split != row.split:
            problems.add(row.place, f"{name!r} is in the split {by_name[name].split!r} from {_line(by_name[name])} on")
        elif name in by_name:
            if entries[-1] is not by_name[name]:
                joined[name] = None
            by_name[name].captions.extend(captions)
        elif other is not None:
            problems.add(row.place, f"duplicate id: {name!r} and {other.file_name!r} of {_line(other)}")
        else:
            entry = Entry(name, row.place, path, captions, row.split)
            entries.append(entry)
            by_name[name] = by_id[entry.image_id] = entry
    if joined:
        problems.notes.append(
            f"the captions of {len(joined):,} images, {next(iter(joined))} the first, stand in several places: joined"
        )
    return entries


def _line(entry: Entry) -> str:
    number = entry.place.rpartition(":")[2]
    return f"line {number}" if number.isdigit() else entry.place


def check_captioned(paths: Iterable[Path], entries: Iterable[Entry], source: str, problems: Problems) -> None:
    """Every image of `paths` should have a caption in `source`."""
    known = {entry.path for entry in entries}
    for path in sorted(paths):
        if path not in known and is_image_file(path):
            problems.add(str(path), f"no caption for this image in {source}")


def note_uncaptioned(images: ImageFolder, entries: Iterable[Entry], source: str, problems: Problems) -> None:
    """Say how many images have no caption in `source`, which holds those of a part as a rule."""
    known = {entry.path for entry in entries}
    others = [path for path in images.files if path not in known]
    if others:
        problems.notes.append(
            f"{len(others):,} images below {images.root}, {others[0].relative_to(images.root)} the first, have no "
            f"caption in {source}: left out"
        )


def check_photos(found: Found, problems: Problems, progress: Progress | None = None) -> Photos:
    """Decode every image to its last byte and cut the splits over those that are left.

    `progress(done, total)` counts checked images. Raises InputError where no image is left.
    """
    checked = _check_images(found.entries, problems, progress)
    if not checked:
        bad = problems.skipped
        left_out = f"; {len(bad):,} were left out, the first: {bad[0]}" if bad else ""
        raise InputError(f"{found.detail}: not one image with a caption is left{left_out}")
    num_train, num_generation_train = report_splits(len(checked))
    photos = tuple(
        Photo(
            image_id=entry.image_id,
            file_name=entry.file_name,
            captions=tuple(entry.captions),
            split_report="train" if index < num_train else "validation",
            split_report_generation="train" if index < num_generation_train else "test",
            split_karpathy=known_split(entry.split) or UNUSED,
            path=str(entry.path.absolute()),
            num_bytes=num_bytes,
        )
        for index, (entry, num_bytes) in enumerate(checked)
    )
    notes = (*problems.notes, *_split_notes([entry for entry, _ in checked]))
    return Photos(found.form, found.detail, photos, tuple(problems.skipped), notes)


def _split_notes(entries: list[Entry]) -> list[str]:
    if not any(entry.split for entry in entries):
        return ["no official split (split files, or a column `split`): split_karpathy is `unused` for all"]
    counts = Counter(entry.split for entry in entries if known_split(entry.split) is None)
    del counts[None]
    known = ", ".join(SPLIT_NAMES)
    return [
        f"split {name!r} is not known: its {count:,} images are `unused`; known are {known}"
        for name, count in counts.items()
    ]


def _check_images(entries: list[Entry], problems: Problems, progress: Progress | None) -> list[tuple[Entry, int]]:
    """The entries whose image decodes, each with the size of its file in bytes."""

    def check(entry: Entry) -> tuple[int, str]:
        """Size; or what is wrong."""
        if not entry.path.is_file():
            return 0, f"missing image {entry.path}"
        data = entry.path.read_bytes()
        try:
            decode_image(data, name=str(entry.path))
        except InputError as error:
            return 0, str(error)
        return len(data), ""

    checked: list[tuple[Entry, int]] = []
    # Threads are enough: Pillow lets other threads run while it decodes.
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for done, (entry, (num_bytes, reason)) in enumerate(zip(entries, pool.map(check, entries), strict=True), 1):
            if reason:
                # The place of an image that no row names is its file.
                problems.add(entry.place, reason.removeprefix(f"{entry.place}: "))
            else:
                checked.append((entry, num_bytes))
            if progress is not None:
                progress(done, len(entries))
    finally:
        pool.shutdown(cancel_futures=True)
    return checked


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
