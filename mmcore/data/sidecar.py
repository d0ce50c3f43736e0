"""Images with a text beside each: ``dog.jpg`` and ``dog.txt``, as tools that fine-tune diffusions keep them.

The lines of the text are the captions. Folders called train, validation and test are splits.
"""

from pathlib import Path

from mmcore.data.caption_row import NUL, one_line
from mmcore.data.image_folder import ImageFolder
from mmcore.data.photos import Entry, Found, Problems, name_to_id
from mmcore.data.splits import are_several
from mmcore.data.tables import numbered_lines

ENDINGS = (".txt", ".caption")


def text_of(image: Path) -> Path | None:
    """The text beside an image, None where there is none."""
    return next((path for ending in ENDINGS if (path := image.with_suffix(ending)).is_file()), None)


def read_sidecars(folder: Path, problems: Problems) -> Found:
    """What was read, and an entry an image in the order of their paths. An image without a text is a problem."""
    entries: list[Entry] = []
    by_id: dict[str, str] = {}
    for path in ImageFolder(folder, folder).files:
        name = path.relative_to(folder).as_posix()
        text = text_of(path)
        if text is None:
            problems.add(str(path), f"no caption for this image in {path.with_suffix(ENDINGS[0]).name} beside it")
            continue
        lines = numbered_lines(text.read_bytes(), str(text), problems.add)
        captions = [one_line(line) for _, line in lines if line.strip()]
        if not captions:
            problems.add(str(text), "the file holds no caption")
        elif any("\0" in caption for caption in captions):
            problems.add(str(text), NUL)
        elif name_to_id(name) in by_id:
            problems.add(str(path), f"duplicate id: {name!r} and {by_id[name_to_id(name)]!r}")
        else:
            by_id[name_to_id(name)] = name
            entries.append(Entry(name, str(path), path, captions))
    folders = {entry.file_name: entry.file_name.partition("/")[0] for entry in entries if "/" in entry.file_name}
    if are_several(folders.values()):
        for entry in entries:
            entry.split = folders.get(entry.file_name)
    return Found("images with a text beside each", str(folder), entries)
