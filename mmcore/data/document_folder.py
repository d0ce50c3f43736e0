"""JSON documents of captions, Karpathy's or COCO's, in a folder with the images that they name, at any depth."""

from pathlib import Path

from mmcore.data.caption_files import read_caption_file
from mmcore.data.caption_row import CaptionRow
from mmcore.data.image_folder import ImageFolder
from mmcore.data.photos import Found, Problems, entries_of, note_uncaptioned, posix_name
from mmcore.data.splits import are_several
from mmcore.errors import InputError


def read_document_folder(documents: list[Path], folder: Path, problems: Problems) -> Found:
    """The images are looked for in all of `folder`; those without a caption are counted in a note.

    Raises InputError where there are no images, or no captions.
    """
    images = ImageFolder(folder, folder)
    names = " and ".join(path.name for path in documents)
    if not images.files:
        raise InputError(f"{folder}: {names} found, and no image; put the images there, or give the folder of both")
    files = {path: read_caption_file(str(path), problems.add) for path in documents}
    if not any(file.rows for file in files.values()):
        raise InputError(f"{documents[0]}: no caption in it")
    rows = list[CaptionRow]()
    for path, file in files.items():
        if any(images.find(posix_name(row.image)) for row in file.rows):
            rows += file.rows
        elif file.rows:
            # COCO's captions come in one zip, and the images of each split in one of their own.
            problems.add(
                str(path),
                f"not one of its {len(file.rows):,} images, {file.rows[0].image} the first, is among the "
                f"{len(images.files):,} below {folder}",
                mend="put them there, or give the other file as --source" if len(documents) > 1 else "put them there",
            )
    entries = entries_of(rows, images, problems)
    splits = {entry.split for entry in entries}
    if not are_several(splits):
        if len(splits) == 1 and None not in splits:
            problems.notes.append(
                f"all images of {names} are of the split {entries[0].split!r}: for several splits, put the captions "
                "and images of another one there too"
            )
        for entry in entries:
            entry.split = None
    note_uncaptioned(images, entries, names, problems)
    return Found(files[documents[0]].form, f"{' and '.join(map(str, documents))}, images below {folder}", entries)
