"""Decoding refuses damaged images and returns intact ones unchanged."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmcore.errors import InputError
from mmcore.images import decode_image, image_grid, png_bytes, read_png_text, resize_image


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_png_decodes_to_the_same_pixels() -> None:
    image = noise()
    assert np.array_equal(np.asarray(decode_image(encoded(image, "PNG"), name="x")), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    assert decode_image(encoded(noise().convert(mode), kind), name="x").mode == "RGB"


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_is_applied(orientation: int) -> None:
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6: the camera was turned; rotate by 270 degrees
    data = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (expected.size == image.size) == (orientation not in (5, 6, 7, 8))
    assert np.array_equal(np.asarray(decode_image(data, name="x")), np.asarray(expected))


# Each of 256 greys once, as 16-bit values: v -> v >> 8.
RAMP = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (Image.fromarray(RAMP), "PNG", {}),
        (Image.fromarray(RAMP), "TIFF", {}),
        (Image.fromarray(RAMP), "PPM", {}),
        (Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF", {}),
        (Image.fromarray(65535 - RAMP), "TIFF", {"tiffinfo": {262: 0}}),  # white is zero
    ],
)
def test_sixteen_bits_keep_their_greys(image: Image.Image, kind: str, options: dict) -> None:
    pixels = np.asarray(decode_image(encoded(image, kind, **options), name="x"))
    assert np.array_equal(pixels, np.repeat((RAMP >> 8)[..., None], 3, axis=2))


def test_twelve_bits_of_a_tiff_keep_their_greys() -> None:
    # Pillow writes no such file: two greys in three bytes, with a hand-made header.
    greys = np.arange(256) * 4095 // 255
    packed = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in greys.reshape(-1, 2).tolist())
    # Width, height, bits, no compression, black is zero, where the pixels begin, one channel, rows, bytes.
    entries = {256: 16, 257: 16, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 16, 279: len(packed)}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(entries)) + table + bytes(4)
    pixels = np.asarray(decode_image(data, name="x"))[..., 0]
    assert np.array_equal(pixels.ravel(), greys >> 4)


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "TIFF"), (np.float32, "TIFF"), (np.float32, "PPM")])
def test_pixels_without_a_white_are_refused_by_name(dtype: type, kind: str) -> None:
    data = encoded(Image.fromarray(RAMP.astype(dtype)), kind)
    with pytest.raises(InputError, match=r"a.tif: its pixels are .* save it with 8 or 16 bits"):
        decode_image(data, name="a.tif")


def test_a_null_is_no_image() -> None:
    with pytest.raises(InputError, match=r"row 3: no image there"):
        decode_image(None, name="row 3")


def test_exif_of_another_type_than_its_tag_has_is_no_concern() -> None:
    """XResolution as raw bytes: Pillow fails to rewrite such EXIF data without the orientation."""
    entries = [(0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 7, 4, b"abcd")]
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4)
    data = encoded(noise(), exif=exif)
    with pytest.raises(TypeError):
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data, name="x").size == (32, 48)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("num_lost", [1, 2, 16, 300])
def test_jpeg_that_lost_its_end_is_refused(progressive: bool, num_lost: int) -> None:
    data = encoded(noise(), quality=85, progressive=progressive)
    decode_image(data, name="whole")
    with pytest.raises(InputError, match=r"^album/cat\.jpg: broken image \(.+\)$"):
        decode_image(data[:-num_lost], name="album/cat.jpg")


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "the file is empty"), (b"not an image at all", "no image format is recognised")]
)
def test_no_image_at_all(data: bytes, reason: str) -> None:
    with pytest.raises(InputError) as caught:
        decode_image(data, name="x")
    assert str(caught.value) == f"x: broken image ({reason})"


def test_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(InputError, match="x: broken image"):
        decode_image(encoded(noise()), name="x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_random_damage_is_an_input_error_or_an_image(kind: str) -> None:
    """Damaged bytes raise nothing but InputError."""
    rng = np.random.default_rng(0)
    whole = encoded(noise(), kind)
    num_refused = 0
    for trial in range(60):
        data = bytearray(whole)
        for position in rng.integers(0, len(data) if trial % 2 else min(100, len(data)), 4):
            data[position] = rng.integers(0, 256)
        try:
            decode_image(bytes(data), name="x")
        except InputError:
            num_refused += 1
    assert num_refused > 5


def test_resize_squashes_to_a_square_array() -> None:
    array = resize_image(noise(60, 20), 16)
    assert array.shape == (16, 16, 3)
    assert array.dtype == np.uint8
    # Left half black, right half white. After squashing both halves are still there.
    halves = Image.new("RGB", (60, 20))
    halves.paste((255, 255, 255), (30, 0, 60, 20))
    squashed = resize_image(halves, 16)
    assert squashed[:, :6].max() == 0
    assert squashed[:, 10:].min() == 255


def test_resize_leaves_the_right_size_alone() -> None:
    image = noise(24, 24)
    assert np.array_equal(resize_image(image, 24), np.asarray(image))


def test_png_keeps_pixels_and_text_and_is_the_same_each_time() -> None:
    pixels = np.asarray(noise())
    text = {"prompt": "a girl in a pink dress, 女孩", "seed": "9223372036854775807", "empty": ""}
    data = png_bytes(pixels, text)
    assert data == png_bytes(pixels, text)
    assert np.array_equal(np.asarray(decode_image(data, name="x")), pixels)
    assert read_png_text(data) == text
    assert read_png_text(png_bytes(pixels)) == {}


def test_text_of_what_is_no_whole_png_is_refused() -> None:
    data = png_bytes(np.asarray(noise()), {"prompt": "x"})
    for broken in (data[: len(data) // 2], b"", encoded(noise(), "JPEG")):
        with pytest.raises(InputError, match=r"^image-1\.png: broken PNG") as raised:
            read_png_text(broken, name="image-1.png")
        assert " at 0x" not in str(raised.value)


def test_a_grid_holds_every_image_in_its_place() -> None:
    images = np.random.default_rng(0).integers(0, 200, (5, 4, 6, 3), dtype=np.uint8)
    grid = image_grid(images, 3)
    assert grid.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for index, image in enumerate(images):
        top, left = index // 3 * 6, index % 3 * 8
        assert np.array_equal(grid[top : top + 4, left : left + 6], image)
    assert (grid[6:, 16:] == 255).all(), "no image in the last place"
    assert (grid[4:6] == 255).all()
