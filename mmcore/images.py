"""Decode and resize images with Pillow (torchvision is never a dependency).

Arrays are uint8 of shape (height, width, 3), channels in the order red, green, blue.
"""

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from mmcore.errors import InputError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".pjpeg", ".pjp"),
    *(".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"),
)
"""File name endings of images, in lower case."""

# Width in pixels and grey value of the gap between the images of a grid.
_GRID_GAP, _GRID_GREY = 2, 255
# Errors that Pillow raises for damaged bytes, found by 400 random corruptions of each of six formats. TypeError is
# raised for a PNG with text chunks named like EXIF or XMP.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error, zlib.error)
# Formats whose integers of more than 8 bits (Pillow's mode I) are scaled to 16 bits. A PGM file states its white value.
_SIXTEEN_BIT_FORMATS = ("PPM",)
# TIFF 6.0, PhotometricInterpretation. Pillow applies it for up to 8 bits only.
_WHITE_IS_ZERO = 0
# The transpose that turns an image upright, by EXIF orientation (EXIF 2.32, tag 0x0112). ImageOps.exif_transpose would
# rewrite all of the EXIF data, which fails for some unrelated tags.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes | None, *, name: str) -> Image.Image:
    """Decode `data` to an upright RGB image (EXIF orientation applied).

    A truncated file is refused, also a JPEG that Pillow could fill up with grey. Of 16 bits the upper 8 are kept, as
    Pillow does for colours. `name` identifies the image in errors. Raises InputError for broken data and for None, a
    null in a table.
    """
    if data is None:
        raise InputError(f"{name}: no image there (null)")
    try:
        with Image.open(io.BytesIO(data)) as image:
            # Load the pixels before the EXIF data: a PNG may store EXIF after the pixels.
            image.load()
            turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            eight_bits = _eight_bits(image, name)
            return (eight_bits if turn is None else eight_bits.transpose(turn)).convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message contains a memory address.
        reason = "no image format is recognised" if data else "the file is empty"
    except Image.DecompressionBombError as error:
        reason = str(error)
    except InputError:
        raise
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
    raise InputError(f"{name}: broken image ({' '.join(reason.split())})") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """`image` with 8 bits per channel. Pillow's own conversion turns all values above 255 white."""
    if not image.mode.startswith(("I", "F")):
        return image
    num_bits = 16
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        # A TIFF may store 12 bits in 16.
        num_bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (num_bits,))[0]
    elif image.mode == "F" or image.format not in _SIXTEEN_BIT_FORMATS:
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        raise InputError(f"{name}: its pixels are {kind} and the value of white is unknown; save it with 8 or 16 bits")
    greys = (np.asarray(image) >> (num_bits - 8)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO:
        greys = 255 - greys
    return Image.fromarray(greys)


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """Resize `image` to `size` x `size` pixels, bicubic with anti-aliasing: a uint8 array (size, size, 3).

    The image is squashed, not cropped: a crop could remove an object that a caption names.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def image_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """A grid of images on white: uint8 (N, H, W, 3) -> uint8 (H', W', 3), with `columns` images per row."""
    num_images, height, width, _ = images.shape
    rows = -(-num_images // columns)
    grid = np.full(
        (rows * (height + _GRID_GAP) - _GRID_GAP, columns * (width + _GRID_GAP) - _GRID_GAP, 3), _GRID_GREY, np.uint8
    )
    for index, image in enumerate(images):
        top, left = index // columns * (height + _GRID_GAP), index % columns * (width + _GRID_GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def png_bytes(image: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """A uint8 image (H, W, 3) as PNG bytes. `text` becomes text chunks (any Unicode). Equal input gives equal bytes."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def read_png_text(data: bytes, *, name: str = "image") -> dict[str, str]:
    """The text chunks of a PNG. Raises InputError, naming `name`, if `data` is not a complete PNG."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {key: str(value) for key, value in image.text.items()}
    except UnidentifiedImageError:
        reason = "not a PNG, or its header is damaged"
    except (Image.DecompressionBombError, *_BROKEN) as error:
        reason = str(error) or type(error).__name__
    raise InputError(f"{name}: broken PNG ({' '.join(reason.split())})") from None
