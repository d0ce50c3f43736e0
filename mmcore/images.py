"""Decode and resize images with Pillow (torchvision is never a dependency).

Arrays are uint8 of shape (height, width, 3), channels in the order red, green, blue.
"""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmcore.errors import InputError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Endings of the files that are taken for images, in lower case."""

# What Pillow raises on damaged bytes, by 400 random corruptions of each of six formats.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def decode_image(data: bytes, *, name: str) -> Image.Image:
    """Decode all of `data` to an RGB image that stands upright (EXIF orientation applied).

    The last byte is needed: a JPEG that lost its end is refused, not filled up with grey.
    `name` says in the error which image it is. Raises InputError.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        # Pillow's own message prints a memory address.
        reason = "no image format is recognised" if data else "the file is empty"
    except Image.DecompressionBombError as error:
        reason = str(error)
    except _BROKEN as error:
        reason = str(error) or type(error).__name__
    raise InputError(f"{name}: broken image ({' '.join(reason.split())})") from None


def resize_image(image: Image.Image, size: int) -> np.ndarray:
    """Squash `image` to `size` x `size` pixels, bicubic with anti-aliasing: a uint8 array (size, size, 3).

    The aspect ratio is squashed and not cropped, so that nothing that a caption names is cut off.
    """
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))
