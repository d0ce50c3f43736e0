"""What a source of captioned images is, found by its content, and its photos, read and checked in full.

A format is one file beside this one, with a function that looks for it in a folder and one that reads it; a new one
takes its lines in `_reader` and `_reader_of_file`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from mmcore.data.archive import unpack_zip
from mmcore.data.caption_folder import captions_files, read_captions_folder
from mmcore.data.coco import coco_files
from mmcore.data.document_folder import read_document_folder
from mmcore.data.huggingface import is_saved_dataset, looks_like_hub_name, read_dataset
from mmcore.data.image_folder import ImageFolder
from mmcore.data.imagefolder import METADATA_FILES, metadata_file, read_imagefolder
from mmcore.data.karpathy import karpathy_files
from mmcore.data.parquet_folder import files_by_split, parquet_files
from mmcore.data.photos import Found, Photos, Problems, Progress, check_photos
from mmcore.data.sidecar import read_sidecars, text_of
from mmcore.data.webdataset import expand_braces, is_shards, read_shards, shard_files
from mmcore.errors import InputError

# A folder that holds nothing but a folder is what an unpacked zip often is; Flickr8k's own has its captions in one.
_MAX_DEPTH = 2
_NUM_ENDINGS = 5
_CAPTION_ENDINGS = (".txt", ".csv", ".tsv", ".token", ".json", ".jsonl", ".parquet")
Reader = Callable[[Problems], Found]


def read_source(
    source: str,
    scratch: Path,
    *,
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> Photos:
    """Read and check a source: every row, every split, and every image decoded to its last byte.

    Args:
        source: a folder, a zip, a file of captions next to its images, tar shards, or a Hugging Face dataset by name.
            Paths of shards may have braces, and may be s3://...
        scratch: an empty folder for what is unpacked; the photos may lie there.
        skip_bad: go on without what is bad, and list it.
        progress: told how many images of how many are done, where they are unpacked and then where they are checked.

    Raises InputError at the first problem, or where nothing is left.
    """
    path = Path(source).expanduser()
    problems = Problems(skip_bad)
    unpacked, images = scratch / "source", scratch / "images"

    def shown(text: str) -> str:
        """As the user knows it, who has never seen where something was unpacked."""
        return text.replace(str(unpacked), str(path)).replace(f"{images}/", "")

    try:
        if is_shards(source) and not path.is_dir():
            name = source if "://" in source else str(path)
            shards = [name] if path.is_file() else expand_braces(name)
            read: Reader = partial(read_shards, shards, images, progress=progress)
        elif path.is_file() and _is_zip(path):
            unpacked.mkdir()
            problems.skipped += unpack_zip(path, unpacked, skip_bad=skip_bad)
            read = _reader(unpacked, images, progress, is_unpacked=True)
        elif path.is_file():
            read = _reader_of_file(path, images, progress)
        elif path.is_dir():
            read = _reader(path, images, progress)
        elif "://" in source:
            raise InputError(f"--source {source}: only tar shards are read from there; fetch the folder or zip first")
        elif looks_like_hub_name(source):
            read = partial(read_dataset, source, images, progress=progress)
        else:
            raise InputError(f"--source {source}: no such folder, file or zip")
        photos = check_photos(read(problems), problems, progress)
    except InputError as error:
        raise InputError(shown(str(error))) from None
    return dataclasses.replace(
        photos,
        detail=shown(photos.detail),
        skipped=tuple(map(shown, photos.skipped)),
        notes=tuple(map(shown, photos.notes)),
    )


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _reader_of_file(path: Path, scratch: Path, progress: Progress | None) -> Reader:
    """How a file that the user named is read, its images beside it, or else beside its folder, as COCO's are."""
    if path.suffix.lower() not in _CAPTION_ENDINGS:
        raise InputError(
            f"--source {path}: no zip, tar or file of captions ({', '.join(_CAPTION_ENDINGS)}); give the folder that "
            "holds the images and their captions"
        )
    path = path.absolute()
    folder = path.parent
    if path in parquet_files(folder):
        return partial(read_dataset, str(path), scratch, progress=progress, parquet=files_by_split([path]))
    if path.name in METADATA_FILES:
        return partial(read_imagefolder, [path], folder)
    near = folder if ImageFolder(folder, folder).files else folder.parent
    if path in (*karpathy_files(folder), *coco_files(folder)):
        return partial(read_document_folder, [path], near)
    return partial(read_captions_folder, [path], near)


def _reader(folder: Path, scratch: Path, progress: Progress | None, *, is_unpacked: bool = False) -> Reader:
    """How `folder` is read: by the format that lies nearest to its top. Raises InputError for none or several.

    `is_unpacked`: from a zip, so that no file of it can be given.
    """
    folders = [folder]
    for _ in range(_MAX_DEPTH + 1):
        found: list[tuple[Path, Reader]] = []
        saved = [each for each in folders if is_saved_dataset(each)]
        found += [(each, partial(read_dataset, str(each), scratch, progress=progress)) for each in saved]
        others = [each for each in folders if each not in saved]
        metadata = _there(metadata_file(each) for each in others)
        if metadata:
            found.append((metadata[0], partial(read_imagefolder, metadata, folder)))
        parquet = [path for each in others for path in parquet_files(each)]
        if parquet:
            splits = files_by_split(parquet)
            found.append((parquet[0], partial(read_dataset, str(folder), scratch, progress=progress, parquet=splits)))
        coco = [path for each in others for path in coco_files(each)]
        if coco:
            found.append((coco[0], partial(read_document_folder, coco, folder)))
        karpathy = [path for each in others for path in karpathy_files(each)]
        found += [(path, partial(read_document_folder, [path], folder)) for path in karpathy]
        taken = {*metadata, *parquet, *coco, *karpathy}
        for captions in (captions_files(each) for each in others):
            if captions and captions[0] not in taken:
                found.append((captions[0], partial(read_captions_folder, captions, folder)))
        shards = [str(path) for each in others for path in shard_files(each)]
        # A tar beside other captions is as a rule what they were unpacked from.
        if shards and not found:
            found.append((Path(shards[0]), partial(read_shards, shards, scratch, progress=progress)))
        if len(found) > 1:
            names = ", ".join(
                f"{path.relative_to(folder)}{' (with splits)' if path in karpathy else ''}" for path, _ in found
            )
            # The images are found beside a file of captions that is named alone.
            first = next((path for path, _ in found if path in karpathy), found[0][0])
            give = (
                f"unpack it and give the right one, such as {first.relative_to(folder)}"
                if is_unpacked
                else f"give the right one, such as --source {first}"
            )
            raise InputError(f"{folder}: may be read by any of {names}; {give}, or take the others away")
        if found:
            return found[0][1]
        folders = sorted(path for each in folders for path in each.iterdir() if path.is_dir() and path.name[0] != ".")
    # Last, as a text beside an image may be anything where there is a file of captions.
    if any(text_of(path) is not None for path in ImageFolder(folder, folder).files):
        return partial(read_sidecars, folder)
    raise InputError(
        f"{folder}: {_held(folder)}; known are captions.txt and the images, NAME.txt beside each NAME.jpg, and the "
        "others under `Sources` in docs/captioners.md"
    )


def _held(folder: Path) -> str:
    """What of no known form is in the folder."""
    files = [
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    endings = Counter(path.suffix.lower() or "no ending" for path in files)
    if not endings:
        return "the folder is empty"
    counts = ", ".join(f"{ending} {count:,}" for ending, count in endings.most_common(_NUM_ENDINGS))
    return f"no captions of a known form in it ({counts})"


def _there(paths: Iterable[Path | None]) -> list[Path]:
    return [path for path in paths if path is not None]
