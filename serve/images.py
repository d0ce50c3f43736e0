"""Images from strangers: their headers are checked before any pixel is decoded.

An image comes as bytes (multipart) or as a data URI. Addresses are never fetched.
"""

import base64
import binascii
import contextlib
import ctypes
import io
import itertools
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from mmcore.errors import InputError
from mmcore.images import decode_image, resize_image
from serve.errors import ApiError, in_bytes, quoted
from serve.limits import Limits

# The formats that are taken. Pillow reads more, but each further decoder could be attacked.
_MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
# A photograph of a phone may hold further pictures (MPO), which are no frames of an animation.
_READERS = {"JPEG": ["JPEG", "MPO"], "PNG": ["PNG"], "GIF": ["GIF"], "WEBP": ["WEBP"]}
_STILL = ("JPEG", "MPO")
# The limit on all text chunks of one PNG, unpacked. Pillow's own is 64 MiB.
_MAX_PNG_TEXT_BYTES = 2**20
# A progressive JPEG is decoded once for each of its scans, of which ten megabytes hold a million: tens of minutes in a
# thread that nobody can stop. Encoders write about ten. The pattern is the head of a scan as libjpeg takes it (length
# and number of components belong together), as its first two bytes alone also stand in thumbnails and behind the end.
_MAX_JPEG_SCANS = 64
_JPEG_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
# Pillow walks through the segments, chunks and blocks of a header in Python, in a thread that nobody can stop: of the
# smallest ones ten megabytes hold millions, which are seconds and hundreds of megabytes. Real images have some dozens.
_MAX_PARTS = 1000
# Bytes between the segments of a JPEG, which Pillow reads one by one; some cameras fill up with a few.
_MAX_JPEG_FILLING = 2**15
# What is no marker: other bytes, an escaped 0xFF, and one before another, which may be the first byte of a marker.
_JPEG_FILLING = re.compile(rb"(?:[^\xff]|\xff\x00|\xff(?=\xff)){0,%d}+" % (_MAX_JPEG_FILLING + 1))
# Of what is not put away as it is, but read: tables and frame headers, EXIF and Photoshop's resources. An EXIF may be
# 64 KiB and has an entry in twelve bytes; Pillow appends one segment's to the other's.
_MAX_EXIF_BYTES = 2**17
_MAX_JPEG_BYTES = {"tables": 2**16, "EXIF": _MAX_EXIF_BYTES, "Photoshop's resources": 2**18}
# The smallest usual chunk of pixels: encoders write 8 KiB (libpng) or more into one.
_MIN_IDAT_BYTES = 1024
# Chunks of a PNG that are unpacked, each to _MAX_PNG_TEXT_BYTES; one that breaks off does not count in their sum.
_MAX_PNG_PACKED = 10
_EXIF_AS_TEXT = b"Raw profile type exif\0"
# Pillow reads a GIF's block in two steps; encoders write 255 bytes into one. Ten thousand shorter blocks are allowed:
# a long XMP stands in blocks of any length.
_MAX_GIF_READS, _FULL_GIF_BLOCK = 20_000, 200
THE_IMAGE = "the image"
"""What a person is told of the only image of a request."""
# Longest beginning of a data URI, up to the comma.
_MAX_DATA_HEAD = 256
# Characters of base64 (four are three bytes) that are unpacked at a time. The first are looked at before the rest is:
# to unpack megabytes takes longer than to refuse most of what is no image.
_BASE64_PART = 2**17
# Of malloc.h.
_M_MMAP_THRESHOLD = -3
# The errors that Pillow raises for damaged headers.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, OverflowError)


def return_large_blocks() -> None:
    """Have this process return blocks of a megabyte or more to the system when they are freed.

    glibc raises its threshold with each large block that is freed, up to 32 MiB, and keeps smaller blocks. After some
    bodies of ten megabytes the process would hold a hundred more.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def harden_pillow() -> None:
    """Limit a PNG's text in this process, and silence Pillow's warnings: one EXIF can cause 65,000 of them."""
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_PNG_TEXT_BYTES
    PngImagePlugin.MAX_TEXT_CHUNK = _MAX_PNG_TEXT_BYTES
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _format(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from the first chunk of a WebP. Pillow would allocate the whole canvas when it opens one."""
    kind, start = data[12:16], data[20:30]
    if len(start) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(start[4:7], "little"), 1 + int.from_bytes(start[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(start[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", start[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None


# Makes a refusal of a message and a code.
_Refuse = Callable[[str, str], ApiError]


def _check_jpeg(data: bytes, refuse: _Refuse) -> None:
    """Check the segments before the first scan, in the steps of Pillow (JpegImageFile._open)."""
    at = 2
    num_segments = num_filling = 0
    sizes = {"tables": 0, "EXIF": 0, "Photoshop's resources": 0}
    while True:
        start = _JPEG_FILLING.match(data, at).end()  # type: ignore[union-attr]  # it matches nothing as well
        num_filling += start - at
        if num_filling > _MAX_JPEG_FILLING:
            raise refuse(f"more than {_MAX_JPEG_FILLING} bytes between its segments", "broken_image")
        if start + 1 >= len(data):
            return
        code, at = data[start + 1], start + 2
        if (marker := JpegImagePlugin.MARKER.get(0xFF00 | code)) is None:
            return
        num_segments += 1
        if num_segments > _MAX_PARTS:
            raise refuse(f"more than {_MAX_PARTS} segments before its pixels", "broken_image")
        # Those that Pillow does nothing with have no length.
        if marker[2] is None:
            continue
        size = max(2, int.from_bytes(data[at : at + 2], "big"))
        body = data[at + 2 : at + 16]
        at += size
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            sizes["EXIF"] += size
        elif code == 0xED and body.startswith(b"Photoshop 3.0\0"):
            sizes["Photoshop's resources"] += size
        elif not (0xE0 <= code <= 0xEF or code == 0xFE):
            sizes["tables"] += size
        if over := [name for name, size in sizes.items() if size > _MAX_JPEG_BYTES[name]]:
            raise refuse(f"more than {_MAX_JPEG_BYTES[over[0]]} bytes of {over[0]}", "broken_image")
        if code == 0xDA:
            return


def _check_png(data: bytes, refuse: _Refuse) -> None:
    """Check all chunks. Pillow also reads the headers of those behind the pixels, when it decodes."""
    at, num_pixels, num_others, num_packed = 8, 0, 0, 0
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        start, at = at + 8, at + 12 + size
        if kind == b"IEND":
            return
        num_pixels += kind == b"IDAT"
        num_others += kind != b"IDAT"
        num_packed += kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and _is_packed(data, start, start + size))
        if num_others > _MAX_PARTS or num_pixels > _MAX_PARTS + len(data) // _MIN_IDAT_BYTES:
            raise refuse(f"more than {max(num_others, num_pixels) - 1} chunks", "broken_image")
        if num_packed > _MAX_PNG_PACKED:
            raise refuse(f"more than {_MAX_PNG_PACKED} packed chunks", "broken_image")
        exif = size if kind == b"eXIf" else 0
        if kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_EXIF_AS_TEXT, start):
            exif = _length_of_text(kind, data[start + len(_EXIF_AS_TEXT) : start + size]) // 2
        if exif > _MAX_EXIF_BYTES:
            raise refuse(f"more than {_MAX_EXIF_BYTES} bytes of EXIF", "broken_image")


def _is_packed(data: bytes, start: int, end: int) -> bool:
    """Whether a text in Unicode is packed: the byte behind its name tells."""
    name_end = data.find(b"\0", start, end)
    return name_end >= 0 and data[name_end + 1 : name_end + 2] != b"\0"


def _length_of_text(kind: bytes, value: bytes) -> int:
    """Of a text chunk behind its name, unpacked, or something above 2 * _MAX_EXIF_BYTES."""
    if kind == b"iTXt" and value[:1] not in (b"", b"\0"):
        # Packed or not, its method, and behind a zero each a language and the name in it.
        value = value[1:2] + value[2:].split(b"\0", 2)[-1]
    elif kind != b"zTXt":
        return len(value)
    try:
        return len(zlib.decompressobj().decompress(value[1:], 2 * _MAX_EXIF_BYTES + 2))
    except zlib.error:
        # Pillow takes it for an empty text.
        return 0


def _check_webp(data: bytes, refuse: _Refuse) -> None:
    """Check all chunks, and those within the frames."""
    at, number = 12, 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        # A frame begins with 16 bytes of its own, then come its chunks.
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)
        number += 1
        if number > _MAX_PARTS:
            raise refuse(f"more than {_MAX_PARTS} chunks", "broken_image")
        if kind == b"EXIF" and size > _MAX_EXIF_BYTES:
            raise refuse(f"more than {_MAX_EXIF_BYTES} bytes of EXIF", "broken_image")


class _GifBytes(io.BytesIO):
    """A GIF that counts Pillow's steps of reading, and refuses after too many."""

    def __init__(self, data: bytes, refuse: _Refuse) -> None:
        super().__init__(data)
        self._left, self._refuse = _MAX_GIF_READS, refuse

    def read(self, size: int | None = -1, /) -> bytes:
        # A full block does not count, nor does the step in which its length was read.
        self._left += 1 if size is not None and size >= _FULL_GIF_BLOCK else -1
        if self._left < 0:
            raise self._refuse(f"more than {_MAX_GIF_READS // 2} short blocks", "broken_image")
        return super().read(size)


def _check_beginning(data: bytes, refuse: _Refuse) -> str:
    """Check the beginning of an image, whose end may be missing; returns its format."""
    kind = _format(data)
    if kind is None:
        raise refuse("not a JPEG, PNG, WebP or GIF" if data else "it is empty", "unsupported_image")
    if kind == "JPEG":
        _check_jpeg(data, refuse)
    return kind


def _refusal_of(param: str, name: str) -> _Refuse:
    def refuse(message: str, code: str) -> ApiError:
        return ApiError(400, f"{name}: {message}", param=param, code=code)

    return refuse


def check_image(data: bytes, limits: Limits, param: str, name: str = THE_IMAGE) -> None:
    """Refuse by size and header alone; nothing is decoded.

    A refusal names the image twice: by `param`, its field, for programs, and by `name` in the words for a person.
    """
    refuse = _refusal_of(param, name)
    if len(data) > limits.max_image_bytes:
        sizes = f"{in_bytes(len(data))}; an image may have {in_bytes(limits.max_image_bytes)}"
        raise refuse(sizes, "image_too_large")
    kind = _check_beginning(data, refuse)
    if kind == "JPEG":
        scans = itertools.islice(_JPEG_SCAN.finditer(data), _MAX_JPEG_SCANS + 1)
        if len(list(scans)) > _MAX_JPEG_SCANS:
            raise refuse(f"more than {_MAX_JPEG_SCANS} scans", "broken_image")
    elif kind == "PNG":
        _check_png(data, refuse)
    elif kind == "WEBP":
        _check_pixels(_webp_size(data), limits, refuse)
        _check_webp(data, refuse)
    try:
        stream = _GifBytes(data, refuse) if kind == "GIF" else io.BytesIO(data)
        with Image.open(stream, formats=_READERS[kind]) as image:
            _check_pixels(image.size, limits, refuse)
            if image.format not in _STILL and _too_many_frames(image, limits.max_frames):
                frames = f"{limits.max_frames} frame{'s'[: limits.max_frames > 1]}"
                raise refuse(f"an animation of more than {frames}; send a still image", "animated_image")
    except UnidentifiedImageError:
        raise refuse(f"a broken {kind}", "broken_image") from None
    except Image.DecompressionBombError:
        most = f"{limits.max_pixels / 1e6:g} megapixels"
        raise refuse(f"too many pixels; an image may have {most}", "image_too_large") from None
    except _BROKEN as error:
        raise refuse(f"a broken {kind} ({' '.join(str(error).split())[:200]})", "broken_image") from None


def _check_pixels(size: tuple[int, int] | None, limits: Limits, refuse: _Refuse) -> None:
    if size is None or min(size) < 1:
        raise refuse("its header is broken", "broken_image")
    if (number := size[0] * size[1]) > limits.max_pixels:
        # Rounded up: what is past the limit never reads as the limit itself.
        megapixels = math.ceil(number / 1e4) / 100
        raise refuse(
            f"{megapixels:g} megapixels ({size[0]} x {size[1]}); an image may have {limits.max_pixels / 1e6:g}",
            "image_too_large",
        )


def _too_many_frames(image: Image.Image, most: int) -> bool:
    # `n_frames` walks through a whole GIF, of which a stranger can make a million frames in a few megabytes.
    if most == 1:
        return bool(getattr(image, "is_animated", False))
    try:
        image.seek(most)
    except EOFError:
        return False
    return True


def decode(data: bytes, sizes: set[int], limits: Limits, param: str, name: str = THE_IMAGE) -> dict[int, np.ndarray]:
    """Check, decode and squash one image to each of `sizes`: uint8 (size, size, 3) by size.

    The bulk jobs do exactly the same with such a file. Raises ApiError, with the names of `check_image`.
    """
    check_image(data, limits, param, name)
    try:
        image = decode_image(data, name=name)
    except InputError as error:
        raise ApiError(400, str(error), param=param, code="broken_image") from None
    return {size: resize_image(image, size) for size in sizes}


def from_data_uri(uri: str, limits: Limits, param: str, name: str = THE_IMAGE) -> bytes:
    """The bytes of ``data:image/...;base64,...``. Any other address is refused: nothing is fetched.

    Raises ApiError, with the names of `check_image`. The beginning of a long URI is looked at first: what check_image()
    refuses by it is refused before the rest is unpacked.
    """
    refuse = _refusal_of(param, name)
    # Looked for at the beginning only: what follows may be megabytes.
    length = uri.find(",", 0, _MAX_DATA_HEAD)
    head = uri[:_MAX_DATA_HEAD] if length < 0 else uri[:length]
    if head[:5].lower() != "data:":
        raise refuse(
            f"addresses are not fetched; send a data URI (data:image/png;base64,...), got {quoted(uri)}",
            "unsupported_url",
        )
    media, *options = head[5:].lower().split(";")
    if length < 0 or not media.startswith("image/") or options[-1:] != ["base64"]:
        raise refuse(
            f"a data URI of an image begins with data:image/...;base64, got {quoted(head)}", "invalid_data_uri"
        )
    most = min(limits.max_image_bytes, limits.max_data_uri_bytes)
    if len(uri) - length - 1 > _base64_length(most):
        raise refuse(
            f"too large; an image may have {in_bytes(most)} as base64, and {in_bytes(limits.max_image_bytes)} as a "
            "file of a form (multipart/form-data to POST /v1/captions)",
            "image_too_large",
        )
    parts: list[bytes] = []
    try:
        # In parts: a copy of the whole address would take longer than to unpack it.
        for start in range(length + 1, len(uri), _BASE64_PART):
            if parts and len(parts[-1]) % 3:
                raise ValueError("it ends before the last part")
            parts.append(binascii.a2b_base64(uri[start : start + _BASE64_PART], strict_mode=True))
            if len(parts) == 1:
                _check_beginning(parts[0], refuse)
        return b"".join(parts)
    except ValueError:
        raise refuse("its base64 is not valid", "invalid_data_uri") from None


def _base64_length(num_bytes: int) -> int:
    return 4 * (num_bytes // 3 + 1)


def longest_data_uri(limits: Limits) -> int:
    """Characters of the longest that from_data_uri() takes, and some."""
    return _MAX_DATA_HEAD + _base64_length(min(limits.max_image_bytes, limits.max_data_uri_bytes))


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
