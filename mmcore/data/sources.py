"""What a source of captioned images is, found by its content, and its photos, read and checked in full.

A format is one file beside this one, with a function that looks for it in a folder and one that reads it; a new one
takes its lines in `_reader`.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mmcore.data.archive import unpack_zip
from mmcore.data.caption_folder import captions_file, read_captions_folder
from mmcore.data.huggingface import is_saved_dataset, looks_like_hub_name, read_dataset
from mmcore.data.imagefolder import metadata_file, read_imagefolder
from mmcore.data.photos import Entry, Photos, Problems, Progress, check_photos
from mmcore.errors import InputError

# A folder that holds nothing but a folder is what an unpacked zip often is; Flickr8k's own has its captions in one.
_MAX_DEPTH = 2
Reader = Callable[[Problems], tuple[str, list[Entry]]]


def read_source(
    source: str,
    scratch: Path,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Photos:
    """Read and check a source: every row, every split, and every image decoded to its last byte.

    Args:
        source: a folder, a zip, or the name of a Hugging Face dataset.
        scratch: an empty folder for what is unpacked; the photos may lie there.
        skip_bad: go on without what is bad, and list it.
        progress: told how many images of how many are done, where they are unpacked and then where they are checked.

    Raises InputError at the first problem, or where nothing is left.
    """
    path = Path(source).expanduser()
    problems = Problems(skip_bad)
    unpacked = scratch / "source"
    if path.is_file():
        with path.open("rb") as file:
            if file.read(2) != b"PK":
                raise InputError(f"--source {source}: a file and no zip; give the folder that holds it and the images")
        unpacked.mkdir()
        problems.skipped += unpack_zip(path, unpacked, skip_bad=skip_bad)
    elif not path.is_dir() and not looks_like_hub_name(source):
        raise InputError(f"--source {source}: no such folder or zip")
    images = scratch / "images"

    def shown(text: str) -> str:
        """As the user knows it, who has never seen where something was unpacked."""
        return text.replace(str(unpacked), str(path)).replace(f"{images}/", "")

    try:
        if path.exists():
            read = _reader(unpacked if path.is_file() else path, images, progress)
        else:
            read = partial(read_dataset, source, images, progress=progress)
        form, entries = read(problems)
        photos = check_photos(form, entries, problems, progress)
    except InputError as error:
        raise InputError(shown(str(error))) from None
    return dataclasses.replace(photos, form=shown(form), skipped=tuple(map(shown, photos.skipped)))


def _reader(folder: Path, scratch: Path, progress: Progress | None) -> Reader:
    """How `folder` is read: by the format that lies nearest to its top. Raises InputError for none or several."""
    folders = [folder]
    for _ in range(_MAX_DEPTH + 1):
        found: list[tuple[Path, Reader]] = []
        saved = [each for each in folders if is_saved_dataset(each)]
        found += [(each, partial(read_dataset, str(each), scratch, progress=progress)) for each in saved]
        metadata = _there(metadata_file(each) for each in folders)
        if metadata:
            found.append((metadata[0], partial(read_imagefolder, metadata, folder)))
        for captions in _there(captions_file(each) for each in folders if each not in saved):
            found.append((captions, partial(read_captions_folder, captions, folder)))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path, _ in found)
            raise InputError(
                f"{folder}: may be read by any of {names}; give the folder of one, or take the others away"
            )
        if found:
            return found[0][1]
        folders = sorted(path for each in folders for path in each.iterdir() if path.is_dir() and path.name[0] != ".")
    reason = "no captions of a known form in it" if any(folder.iterdir()) else "the folder is empty"
    raise InputError(
        f"{folder}: {reason}; it should hold captions.txt (or results.csv, or Flickr8k.token.txt) and the images, or "
        "images and metadata.jsonl (or .csv), or a dataset that datasets saved"
    )


def _there(paths: Iterable[Path | None]) -> list[Path]:
    return [path for path in paths if path is not None]
