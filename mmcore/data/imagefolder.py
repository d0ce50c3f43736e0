"""Hugging Face's imagefolder: images in folders, beside them ``metadata.jsonl``, ``.csv`` or ``.parquet``.

Each row has the image's path, from its own metadata file on, in ``file_name`` and the caption in ``text`` or another
known column. Folders called train, validation and test are splits; so is a column ``split``.
"""

import os
from dataclasses import replace
from pathlib import Path

from mmcore.data.caption_files import read_caption_file
from mmcore.data.image_folder import ImageFolder
from mmcore.data.photos import Found, Problems, check_captioned, entries_of
from mmcore.data.splits import are_several
from mmcore.errors import InputError

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of `folder`, None where there is none. Raises InputError for several."""
    there = [folder / name for name in METADATA_FILES if (folder / name).is_file()]
    if len(there) > 1:
        raise InputError(f"{folder}: holds {' and '.join(path.name for path in there)}; leave one of them there")
    return there[0] if there else None


def read_imagefolder(metadata: list[Path], folder: Path, problems: Problems) -> Found:
    """What was read, and an entry an image, file by file and in the order of their rows. Raises InputError.

    Names and ids are counted from the folder of the metadata file, of several from the one that holds all. No image of
    `folder` may be without a caption.
    """
    root = Path(os.path.commonpath([path.parent for path in metadata]))
    rows, forms = [], []
    for path in metadata:
        file = read_caption_file(str(path), problems.add)
        below = path.parent.relative_to(root)
        rows += [replace(row, image=(below / row.image).as_posix() if row.image else "") for row in file.rows]
        forms.append(f"{path} ({file.form})")
    if not rows:
        raise InputError(f"{metadata[0]}: no caption in it; a row has a file_name and a text")
    entries = entries_of(rows, ImageFolder(root, root), problems)
    by_folder = {entry.file_name: entry.file_name.partition("/")[0] for entry in entries}
    if are_several(by_folder.values()) and not any(entry.split for entry in entries):
        for entry in entries:
            entry.split = by_folder[entry.file_name]
        forms.append("splits by folder")
    check_captioned(folder.rglob("*"), entries, metadata[0].name, problems)
    return Found("Hugging Face's imagefolder", ", ".join(forms), entries)
