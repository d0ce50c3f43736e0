"""A Hugging Face dataset of captioned images, its images written to a folder.

The package ``datasets`` is needed for this alone and is installed with the tools of development (`make setup`). Code
from a hub is never run (`datasets` 4 and later cannot).
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from mmcore.data.caption_columns import Columns, find_columns
from mmcore.data.caption_row import NUL, as_captions, as_split, one_line
from mmcore.data.caption_text import is_image_name
from mmcore.data.photos import Entry, Found, Problems, Progress, name_to_id
from mmcore.data.splits import are_several
from mmcore.errors import InputError

IMAGE_COLUMN = "image"
# What `Dataset.save_to_disk` and `DatasetDict.save_to_disk` leave in a folder.
_SAVED_FILES = ("dataset_info.json", "dataset_dict.json")
_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `datasets`' save_to_disk."""
    return any((folder / name).is_file() for name in _SAVED_FILES)


def looks_like_hub_name(source: str) -> bool:
    """Whether `source` may be the name of a dataset on the hub, such as ``jxie/flickr8k``."""
    return _HUB_NAME.fullmatch(source) is not None and not source.endswith(".zip")


def read_dataset(
    source: str,
    folder: Path,
    problems: Problems,
    progress: Progress | None = None,
    parquet: Mapping[str, Sequence[Path]] | None = None,
) -> Found:
    """Write the images of a dataset to `folder`; what was read, and an entry an image.

    `source`: a dataset on the hub or saved to disk, or the folder of `parquet`, the files of each split.

    The images are in a column ``image``, their captions in one that caption_columns.py knows, each a list or a string.
    The split is from a column ``split``, else from the dataset if it has several splits. If every image has a unique
    file name, images are sorted by name, as in Flickr8k's captions.txt. Otherwise they are named SPLIT-INDEX and keep
    their order. Rows of the same image, such as one per caption, are joined. Image bytes are unchanged. Raises
    InputError.
    """
    splits = _load(source, folder.parent / "datasets", parquet)
    columns = {split: _columns(source, split, dataset) for split, dataset in splits.items()}
    of_column = {split: _column_of_splits(dataset, columns[split]) for split, dataset in splits.items()}
    names = _file_names(splits, columns)
    several = are_several(splits)
    total = sum(len(dataset) for dataset in splits.values())
    folder.mkdir(parents=True)
    entries: dict[str, Entry] = {}
    done = 0
    for split, dataset in splits.items():
        for index, row in enumerate(dataset):
            done += 1
            place = f"{source}: {split}[{index}]"
            data = _image_bytes(row[IMAGE_COLUMN])
            captions = as_captions([value for name in columns[split].captions if (value := row[name]) is not None])
            captions = captions and tuple(one_line(caption) for caption in captions if caption.strip())
            if data is None:
                problems.add(place, f"`{IMAGE_COLUMN}` holds no encoded image")
            elif not captions:
                problems.add(place, f"`{' and '.join(columns[split].captions)}` holds no text")
            elif any("\0" in caption for caption in captions):
                problems.add(place, NUL)
            else:
                name = names[split, index] if names else f"{split}-{index:06d}{_suffix(data)}"
                key = name if names else f"{split} {_digest(data)}"
                row_split = of_column[split](row) or (split if several else None)
                if key not in entries:
                    (folder / name).write_bytes(data)
                    entries[key] = Entry(name, place, folder / name, [], row_split)
                if entries[key].split == row_split:
                    entries[key].captions.extend(captions)
                else:
                    problems.add(place, f"{name!r} is already in the {entries[key].split} split")
            if progress is not None:
                progress(done, total)
    found = sorted(entries.values(), key=lambda entry: entry.file_name) if names else list(entries.values())
    described = {f"{IMAGE_COLUMN} and {each.described()}" for each in columns.values()}
    form = "Hugging Face dataset" if parquet is None else "Hugging Face dataset in Parquet"
    if len(splits) > 1:
        form += f" of {len(splits)} splits"
    return Found(form, f"{source} ({total:,} rows; {'; '.join(sorted(described))})", found)


def _load(source: str, cache: Path, parquet: Mapping[str, Sequence[Path]] | None) -> dict[str, Any]:
    """Split name to `datasets.Dataset` whose images are not decoded; Parquet goes through the folder `cache`."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise InputError(f"{source}: to read it as a Hugging Face dataset: pip install datasets") from None
    try:
        saved = Path(source).exists()
        if parquet is not None:
            files = {split: [str(path) for path in paths] for split, paths in parquet.items()}
            loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache))
        else:
            loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    # Offline, unknown name, gated, damaged: the hub's client has no common base class for them.
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = "saved dataset cannot be read" if saved else "no such folder or zip, nor dataset of this name"
        raise InputError(f"{source}: {kind} ({type(error).__name__}: {reason})") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    for split, dataset in splits.items():
        if IMAGE_COLUMN not in dataset.column_names:
            columns = ", ".join(dataset.column_names)
            raise InputError(f"{source}: split {split!r} has no column `{IMAGE_COLUMN}`, only {columns}")
        if isinstance(dataset.features[IMAGE_COLUMN], datasets.Image):
            splits[split] = dataset.cast_column(IMAGE_COLUMN, datasets.Image(decode=False))
    return splits


def _columns(source: str, split: str, dataset: Any) -> Columns:
    names = [name for name in dataset.column_names if name != IMAGE_COLUMN]
    return find_columns(names, f"{source}: split {split!r}", images_in_table=True)


def _column_of_splits(dataset: Any, columns: Columns) -> Callable[[dict[str, Any]], str | None]:
    """A row's own split; None for all where no column says it."""
    column = columns.split
    if column is None:
        return lambda row: None
    # A ClassLabel is stored as a number, -1 where there is none.
    names = getattr(dataset.features[column], "names", None)

    def split_of(row: dict[str, Any]) -> str | None:
        value = row[column]
        if names and isinstance(value, int):
            return names[value] if value >= 0 else None
        return as_split(value)

    return split_of


def _file_names(splits: dict[str, Any], columns: dict[str, Columns]) -> dict[tuple[str, int], str]:
    """(split, index) to file name where every image has one, and each its own; else empty."""
    names: dict[tuple[str, int], str] = {}
    images: dict[str, tuple[str, str]] = {}
    for split, dataset in splits.items():
        column = columns[split].image
        for index, row in enumerate(dataset.select_columns([IMAGE_COLUMN, column] if column else [IMAGE_COLUMN])):
            path = row[IMAGE_COLUMN].get("path") if isinstance(row[IMAGE_COLUMN], dict) else None
            if not path and column and isinstance(row[column], str) and is_image_name(row[column]):
                path = row[column]
            name = PureWindowsPath(PurePosixPath(path or "").name).name
            if not name or name == "..":
                return {}
            image = name, _digest(_image_bytes(row[IMAGE_COLUMN]) or b"")
            if images.setdefault(name_to_id(name), image) != image:
                return {}
            names[split, index] = name
    return names


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _image_bytes(image: Any) -> bytes | None:
    if isinstance(image, dict):
        path = image.get("path")
        image = image.get("bytes") or (Path(path).read_bytes() if path and Path(path).is_file() else None)
    return image if isinstance(image, bytes) else None


def _suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ".jpg" if image.format == "JPEG" else f".{(image.format or 'jpg').lower()}"
    except UnidentifiedImageError:
        return ".jpg"  # the check that follows names it as broken
