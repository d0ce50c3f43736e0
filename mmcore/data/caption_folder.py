"""A folder with a file of captions and the images that it names: Flickr8k, Flickr30k, and people's own in that form.

The captions are in ``captions.txt`` (Kaggle's Flickr8k and Flickr30k), ``results.csv`` or ``Flickr8k.token.txt``, or in
the only file whose first line says that it holds captions; caption_text.py has the forms. The images are beside it, in
a folder there, or in one beside its folder, and else anywhere below. The official split of Flickr8k,
``Flickr_8k.{train,dev,test}Images.txt``, may lie in ``splits/``, in ``Flickr8k_text/`` or beside the captions.
"""

from dataclasses import replace
from pathlib import Path

from mmcore.data.caption_columns import is_column_name
from mmcore.data.caption_files import read_caption_file
from mmcore.data.caption_row import CaptionRow
from mmcore.data.caption_text import find_layout, image_name, is_image_name
from mmcore.data.image_folder import ImageFolder
from mmcore.data.photos import Found, Problems, check_captioned, entries_of
from mmcore.data.splits import known_split, split_in
from mmcore.data.tables import numbered_lines
from mmcore.errors import InputError
from mmcore.images import IMAGE_SUFFIXES

CAPTIONS_FILES = (
    "captions.txt",
    "captions.csv",
    "captions.tsv",
    "captions.jsonl",
    "captions.json",
    "captions.parquet",
    "results.csv",
    "Flickr8k.token.txt",
    "results_20130124.token",
)
"""Names by which the captions are known; of several in a folder the first here is read."""
_FORMS = {
    "results.csv": "Flickr30k's captions",
    "results_20130124.token": "Flickr30k's captions",
    "Flickr8k.token.txt": "Flickr8k's captions",
}
IMAGES_FOLDERS = ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k_images", "flickr30k-images")
"""Where the images are looked for first."""
SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "validation": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
SPLIT_FOLDERS = ("splits", ".", "Flickr8k_text")
_TEXT_ENDINGS = (".txt", ".csv", ".tsv", ".token")
_HEAD_BYTES = 4096
_NUM_NAMES_TRIED = 100
_NUM_UNREAD_NAMED = 5


def captions_files(folder: Path) -> list[Path]:
    """The file of captions of `folder`, none, or one a split where their names say which: train.csv and val.csv.

    Raises InputError for several otherwise.
    """
    for name in CAPTIONS_FILES:
        if (folder / name).is_file():
            return [folder / name]
    texts = sorted(path for path in folder.iterdir() if path.suffix.lower() in _TEXT_ENDINGS and path.is_file())
    found = [path for path in texts if not path.name.startswith(("metadata.", ".")) and _holds_captions(path)]
    splits = [known_split(split_in(path.name)) for path in found]
    if len(found) > 1 and (None in splits or len(set(splits)) < len(splits)):
        raise InputError(
            f"{folder}: {' and '.join(path.name for path in found)} may hold the captions; give the right one as "
            f"--source, or call it {CAPTIONS_FILES[0]}"
        )
    return found


def _holds_captions(path: Path) -> bool:
    """Whether the first line is a header with known columns, or an image's name and a text of several words."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    first = next((line for line in head.decode("utf-8", "replace").splitlines() if line.strip()), "")
    try:
        layout = find_layout([first], str(path))
    except InputError:
        return False
    if layout.has_header:
        return True
    fields = layout.fields(first)
    return fields is not None and is_image_name(fields[0]) and " " in fields[-1] and not is_column_name(fields[-1])


def read_captions_folder(captions: list[Path], folder: Path, problems: Problems) -> Found:
    """What was read, and an entry an image in the order of the files `captions`, of one folder. Raises InputError.

    No image outside of `folder` is looked for.
    """
    rows, forms = list[CaptionRow](), []
    for path in captions:
        file = read_caption_file(str(path), problems.add)
        split = split_in(path.name) if len(captions) > 1 else None
        rows += [replace(row, split=row.split or split) for row in file.rows]
        forms.append(f"{path} ({file.form})")
    if not rows:
        raise InputError(f"{captions[0]}: no caption in it; a row is `image,caption`")
    base, names = captions[0].parent, " and ".join(path.name for path in captions)
    images = _images_folder(base, folder, rows)
    entries = entries_of(rows, ImageFolder(images, folder), problems)
    splits = _split_paths(base)
    split_of = _read_splits(splits, {entry.file_name for entry in entries}, names, problems)
    for entry in entries:
        entry.split = split_of.get(entry.file_name, entry.split)
    check_captioned(images.iterdir(), entries, names, problems)
    detail = f"{' and '.join(forms)}, images in {images}"
    if splits:
        detail += f", split of {next(iter(splits.values())).name} ..."
    if unread := _unread(base, {*captions, *splits.values()}):
        more = f" and {len(unread) - _NUM_UNREAD_NAMED:,} more" if len(unread) > _NUM_UNREAD_NAMED else ""
        detail += f"; not read: {', '.join(unread[:_NUM_UNREAD_NAMED])}{more}"
    return Found(_FORMS.get(captions[0].name, "a file of captions"), detail, entries)


def _unread(base: Path, read: set[Path]) -> list[str]:
    """The names of the files in `base` that are neither among `read` nor images nor hidden."""
    files = sorted(path for path in base.iterdir() if path not in read and path.is_file())
    return [path.name for path in files if path.suffix.lower() not in IMAGE_SUFFIXES and path.name[0] != "."]


def _images_folder(base: Path, folder: Path, rows: list[CaptionRow]) -> Path:
    """The folder that holds most of the images: those known by name first, then any near the captions in `base`."""
    near = [base] if base == folder else [base, base.parent]
    named = [place / name for place in near for name in IMAGES_FOLDERS]
    inside = [path for place in near for path in sorted(place.iterdir()) if path.is_dir()]
    # A zip that was unpacked into a folder of its own name.
    nested = [path / path.name for path in inside]
    wanted = list(dict.fromkeys(row.image for row in rows))[:_NUM_NAMES_TRIED]
    candidates = [path for path in dict.fromkeys((*named, base, *inside, *nested)) if path.is_dir()]
    return max(candidates, key=lambda path: sum((path / name).is_file() for name in wanted), default=base)


def _split_paths(base: Path) -> dict[str, Path]:
    splits: dict[str, Path] = {}
    for split, name in SPLIT_FILES.items():
        for place in SPLIT_FOLDERS:
            if (base / place / name).is_file():
                splits[split] = base / place / name
                break
    return splits


def _read_splits(splits: dict[str, Path], known: set[str], captions_name: str, problems: Problems) -> dict[str, str]:
    """File name to official split; empty where there are no split files."""
    if splits and len(splits) < len(SPLIT_FILES):
        missing = [name for split, name in SPLIT_FILES.items() if split not in splits]
        present = next(iter(splits.values()))
        problems.add(str(present), f"{' and '.join(missing)} should stand beside it")
    split_of: dict[str, str] = {}
    for split, path in splits.items():
        for number, line in numbered_lines(path.read_bytes(), str(path), problems.add):
            name = image_name(line.strip())
            place = f"{path}:{number}"
            if not name:
                continue
            if name not in known:
                problems.add(place, f"unknown id {name!r}, not an image of {captions_name}")
            elif name in split_of:
                problems.add(place, f"{name!r} is already in the {split_of[name]} split")
            else:
                split_of[name] = split
    return split_of
