"""A Hugging Face dataset of captioned images, unpacked to a folder in the form that flickr8k.py reads.

One code path then checks and writes both. The package ``datasets`` is needed for this alone and is
installed with the tools of development (`make setup`). Code from a hub is never run (`datasets` 4 and later cannot).
"""

import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmcore.data.flickr8k import CAPTIONS_FILE, IMAGES_FOLDER, SPLIT_FILES, SPLIT_FOLDERS
from mmcore.errors import InputError

CAPTION_COLUMNS = ("captions", "caption", "text")
_NUMBERED_CAPTION = re.compile(r"caption_(\d+)")
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in a folder.
_SAVED_FILES = ("dataset_info.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets`' save_to_disk."""
    return any((folder / name).is_file() for name in _SAVED_FILES)


def looks_like_hub_name(source: str) -> bool:
    """Whether `source` may be the name of a dataset on the hub, such as ``jxie/flickr8k``."""
    return _HUB_NAME.fullmatch(source) is not None and not source.endswith(".zip")


def unpack_dataset(source: str, folder: Path, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Write images, captions.txt and, of a dataset with several splits, the split files to `folder`.

    The dataset has a column ``image`` and its captions in ``captions``, ``caption`` or ``text`` (a list or
    one string) or in ``caption_0``, ``caption_1``, ... Where every image has a file name of its own, they are
    in the order of their names, as in Flickr8k's captions.txt; else they are named SPLIT-INDEX and keep the
    order of the dataset. Image bytes stay as they are. Raises InputError.
    """
    splits = _load(source)
    total = sum(len(dataset) for dataset in splits.values())
    (folder / IMAGES_FOLDER).mkdir(parents=True)
    names = _file_names(splits)
    rows: list[tuple[str, list[str]]] = []
    split_of: dict[str, list[str]] = {split: [] for split in SPLIT_FILES}
    for split, dataset in splits.items():
        columns = _caption_columns(source, split, dataset.column_names)
        for index, row in enumerate(dataset):
            place = f"{source}: {split}[{index}]"
            data = _image_bytes(row["image"], place)
            name = names[split, index] if names else f"{split}-{index:06d}{_suffix(data)}"
            (folder / IMAGES_FOLDER / name).write_bytes(data)
            rows.append((name, list(_captions(row, columns, place))))
            if split in _SPLIT_NAMES:
                split_of[_SPLIT_NAMES[split]].append(name)
            if progress is not None:
                progress(len(rows), total)
    if names:
        rows.sort()
    lines = ["image,caption"]
    for name, captions in rows:
        # Always quoted, so that a caption that is itself in quotation marks keeps them.
        lines += ['{},"{}"'.format(name, caption.replace('"', '""')) for caption in captions]
    (folder / CAPTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if len(splits) > 1 and any(split_of.values()):
        (folder / SPLIT_FOLDERS[0]).mkdir()
        for split, file_name in SPLIT_FILES.items():
            text = "".join(f"{name}\n" for name in split_of[split])
            (folder / SPLIT_FOLDERS[0] / file_name).write_text(text, encoding="utf-8")


def _load(source: str) -> dict[str, Any]:
    """Split name to `datasets.Dataset` whose images are not decoded."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(
            f"{source}: is no folder or zip, and to read it as a Hugging Face dataset: pip install datasets"
        ) from None
    try:
        saved = Path(source).is_dir()
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    # Offline, unknown name, gated, damaged: the hub's client has no common base class for them.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = "saved dataset cannot be read" if saved else "no such folder or zip, nor dataset of this name"
        raise InputError(f"{source}: {kind} ({type(error).__name__}: {reason})") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    for split, dataset in splits.items():
        if "image" not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise InputError(f"{source}: split {split!r} has no column `image`, only {columns}")
        if isinstance(dataset.features["image"], datasets.Image):
            splits[split] = dataset.cast_column("image", datasets.Image(decode=False))
    return splits


def _file_names(splits: dict[str, Any]) -> dict[tuple[str, int], str]:
    """(split, index) to file name where every image has one, and each its own; else empty."""
    names: dict[tuple[str, int], str] = {}
    for split, dataset in splits.items():
        for index, image in enumerate(dataset.select_columns("image")):
            path = image["image"].get("path") if isinstance(image["image"], dict) else None
            name = PureWindowsPath(PurePosixPath(path or "").name).name
            if not name or "," in name:
                return {}
            names[split, index] = name
    stems = {Path(name).stem for name in names.values()}
    return names if len(stems) == len(names) else {}


def _caption_columns(source: str, split: str, columns: list[str]) -> list[str]:
    for name in CAPTION_COLUMNS:
        if name in columns:
            return [name]
    numbered = [match for match in map(_NUMBERED_CAPTION.fullmatch, columns) if match]
    if not numbered:
        raise InputError(
            f"{source}: split {split!r} has the columns {', '.join(columns)}; "
            f"its captions should be in {', '.join(CAPTION_COLUMNS)} or caption_0, caption_1, ..."
        )
    return [match.group() for match in sorted(numbered, key=lambda match: int(match[1]))]


def _captions(row: dict[str, Any], columns: list[str], place: str) -> Iterator[str]:
    for column in columns:
        values = row[column] if isinstance(row[column], list) else [row[column]]
        for value in values:
            if value is not None and not isinstance(value, str):
                raise InputError(f"{place}: `{column}` holds {type(value).__name__}, not text")
            if value and value.strip():
                yield " ".join(value.split())


def _image_bytes(image: Any, place: str) -> bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or (Path(image["path"]).read_bytes() if image.get("path") else None)
    if not isinstance(image, bytes):
        raise InputError(f"{place}: `image` holds no encoded image")
    return image


def _suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ".jpg" if image.format == "JPEG" else f".{(image.format or 'jpg').lower()}"
    except UnidentifiedImageError:
        return ".jpg"  # the check that follows names it as broken
