"""JSON documents of captions, Karpathy's or COCO's, in a folder with the images that they name, at any depth."""

from pathlib import Path

from mmcore.data.caption_files import read_caption_file
from mmcore.data.caption_row import CaptionRow
from mmcore.data.image_folder import ImageFolder
from mmcore.data.photos import Found, Problems, entries_of, note_uncaptioned
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
    form, rows = "", list[CaptionRow]()
    for path in documents:
        file = read_caption_file(str(path), problems.add)
        form = file.form
        rows += file.rows
    if not rows:
        raise InputError(f"{documents[0]}: no caption in it")
    entries = entries_of(rows, images, problems)
    if not are_several(entry.split for entry in entries):
        for entry in entries:
            entry.split = None
    note_uncaptioned(images, entries, names, problems)
    return Found(form, f"{' and '.join(map(str, documents))}, images below {folder}", entries)
