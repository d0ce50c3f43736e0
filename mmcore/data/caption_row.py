"""What one row of captions says, whatever file it stands in."""

from dataclasses import dataclass
from typing import Any

from mmcore.data.caption_text import image_name

NUL = "the caption holds a NUL character; take it out"


@dataclass(frozen=True)
class CaptionRow:
    """`captions` of the image that the file calls `image`: one as a rule, and "" where the field is empty.

    `aliases`: what else the image is called, such as COCO's number.
    """

    place: str
    image: str
    captions: tuple[str, ...]
    split: str | None = None
    aliases: tuple[str, ...] = ()


def as_name(value: Any) -> str | None:
    """The name of an image, None where `value` is none: text, or COCO's whole number, 139.0 in tables of pandas."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return image_name(value.strip()) if isinstance(value, str) and value.strip() else None


def as_split(value: Any) -> str | None:
    """The split that a row says, None where it says none; what is no text is spelled out and then not known."""
    text = "" if value is None or value != value else str(value).strip()
    return text or None


def as_captions(values: list[Any]) -> tuple[str, ...] | None:
    """The captions in the columns of one row, each a text or a list of texts; None where one is something else."""
    flat = [each for value in values for each in (value if isinstance(value, list) else [value])]
    return tuple(flat) if all(isinstance(each, str) for each in flat) else None


def one_line(caption: str) -> str:
    """The caption with single spaces: those of COCO hold line ends."""
    return " ".join(caption.split())
