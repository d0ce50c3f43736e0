"""The size of images as commands write it: WIDTHxHEIGHT."""

import re

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def parse_size(text: str) -> tuple[int, int] | None:
    """Height and width of ``WIDTHxHEIGHT``; None for another text."""
    match = _SIZE.fullmatch(text)
    return None if match is None else (int(match[2]), int(match[1]))
