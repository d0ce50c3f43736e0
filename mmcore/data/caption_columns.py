"""Which columns of a table of captions name the image, hold its captions and say its split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmcore.errors import InputError

IMAGE_COLUMNS = ("file_name", "filename", "image_name", "image", "image_id", "img_id")
CAPTION_COLUMNS = ("caption", "captions", "comment", "text", "sentence", "description")
"""In both, the first one that is there counts."""
SPLIT_COLUMN = "split"
NUMBER_COLUMN = "comment_number"
_NUMBERED_CAPTION = re.compile(r"caption_?(\d+)")
# What pandas' to_csv and read_csv call an index.
_INDEX_COLUMNS = ("", "unnamed:_0")


@dataclass(frozen=True)
class Columns:
    """Names as the table has them; `image` is None where it was not asked for or is not there."""

    image: str | None
    captions: tuple[str, ...]
    split: str | None
    unread: tuple[str, ...]

    def described(self, detail: str = "") -> str:
        """`columns image_name and comment`, then `detail`, then `; not read: comment_number`."""
        read = [name for name in (self.image, *self.captions, self.split) if name is not None]
        listed = f"{', '.join(read[:-1])} and {read[-1]}" if len(read) > 1 else read[0]
        unread = f"; not read: {', '.join(self.unread)}" if self.unread else ""
        return f"column{'s' * (len(read) > 1)} {listed}{detail}{unread}"


def find_columns(names: Sequence[str], place: str, *, images_in_table: bool = False) -> Columns:
    """The columns by their names, capitals and spaces aside.

    `images_in_table`: the images themselves stand in a column that the caller knows, so that a name is optional.
    Raises InputError that names the columns there and those that are known.
    """
    spelled = [_plain(name) for name in names]
    image = next((names[spelled.index(known)] for known in IMAGE_COLUMNS if known in spelled), None)
    captions = [names[spelled.index(known)] for known in CAPTION_COLUMNS if known in spelled][:1]
    if not captions:
        numbered = [(int(match[1]), name) for name in names if (match := _NUMBERED_CAPTION.fullmatch(_plain(name)))]
        captions = [name for _, name in sorted(numbered)]
    if not captions or (image is None and not images_in_table):
        missing = [f"the image ({', '.join(IMAGE_COLUMNS)})"] * (image is None and not images_in_table)
        missing += [f"its captions ({', '.join(CAPTION_COLUMNS)}, caption_0, ...)"] * (not captions)
        raise InputError(
            f"{place}: the columns are {', '.join(map(repr, names))}; none is known to hold {' or '.join(missing)}; "
            "rename the one that does"
        )
    split = names[spelled.index(SPLIT_COLUMN)] if SPLIT_COLUMN in spelled else None
    read = {image, *captions, split}
    unread = tuple(name for name in names if name not in read and _plain(name) not in _INDEX_COLUMNS)
    return Columns(image, tuple(captions), split, unread)


def is_column_name(text: str) -> bool:
    """Whether `text` is what heads a column of a table of captions."""
    known = (*IMAGE_COLUMNS, *CAPTION_COLUMNS, NUMBER_COLUMN)
    return _plain(text) in known or _NUMBERED_CAPTION.fullmatch(_plain(text)) is not None


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_")
