"""Images from clients: refused by header before decoding, decoded as in the bulk jobs, addresses never fetched."""

import base64
import contextlib
import dataclasses
import io
import random
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, PngImagePlugin
from serving import COLOURS, data_uri, picture, tries

from mmcore.images import decode_image, resize_image
from serve import images
from serve.errors import ApiError
from serve.limits import Limits

LIMITS = Limits()
# Limits of one refusal: CPU seconds, and memory beyond the image itself.
MAX_CPU_S, MAX_MEMORY = 0.1, 50 * 2**20


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(code: int, data: bytes = b"") -> bytes:
    """One segment of a JPEG."""
    return bytes([0xFF, code]) + struct.pack(">H", len(data) + 2) + data


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims a size and contains almost no data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animation(format: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def of_many_scans(number: int) -> bytes:
    """A progressive JPEG that repeats its last scan. Each scan costs a pass over all pixels."""
    whole = picture(size=(64, 64), format="JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    there = whole.count(b"\xff\xda")
    return whole[:-2] + scan * (number - there) + whole[-2:]


def with_text(**text: str) -> bytes:
    """A PNG with text chunks."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    return picture(pnginfo=chunks)


def with_exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A rotated JPEG whose EXIF holds these entries: tag, type, count, four bytes with a value or its offset."""
    packed = [struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(packed)) + b"".join(packed) + bytes(4)
    return picture(size=(40, 30), format="JPEG", exif=b"Exif\0\0" + tiff)


ON_ITS_SIDE = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


def webp_header(width: int, height: int) -> bytes:
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


def filled(start: bytes, part: bytes, end: bytes, size: int = LIMITS.max_image_bytes) -> bytes:
    """Repeat `part` between two halves of an image, up to the largest allowed length."""
    return start + part * ((size - len(start) - len(end)) // len(part)) + end


def webp_with(parts: bytes) -> bytes:
    body = webp_header(40, 30)[8:] + picture(format="WEBP")[12:] + parts
    return b"RIFF" + struct.pack("<I", len(body)) + body


def directory(number: int) -> bytes:
    """An EXIF with this many entries."""
    entries = b"".join(struct.pack("<HHII", index, 4, 1, 8) for index in range(number))
    return b"II*\0" + struct.pack("<IH", 8, number) + entries + bytes(4)


def of_many_parts(size: int = LIMITS.max_image_bytes) -> dict[str, bytes]:
    """Images of as many small parts as fit into `size`.

    Reading each part would take seconds and hundreds of megabytes.
    """
    jpeg, png, gif = picture(format="JPEG"), picture(), picture(format="GIF")
    exif, photoshop = b"Exif\0\0", b"Photoshop 3.0\0" + (b"8BIM\1" + bytes(7)) * 5400
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n1\n" + directory(40_000).hex().encode())
    damaged = b"x\0\0" + zlib.compress(bytes(2**20 - 10), 9)[:-1] + b"x"
    pixels, first = png.index(b"IDAT") - 4, gif.index(b"\x2c", 13 + 3 * (2 << (gif[10] & 7)))

    def jpegs(part: bytes, size: int = size) -> bytes:
        return filled(jpeg[:2], part, jpeg[2:], size)

    def pngs(part: bytes) -> bytes:
        return filled(png[:33], part, png[33:], size)

    return {
        "jpeg of markers": jpegs(segment(0xE5)),
        "jpeg of comments": jpegs(segment(0xFE)),
        "jpeg of markers without length": jpegs(b"\xff\xd0"),
        "jpeg of filling": jpegs(b"\xff"),
        "jpeg of escaped bytes": jpegs(b"\xff\0"),
        "jpeg of zeros": jpegs(segment(0xE5)[:3] + b"\2" + bytes(100_000)),
        "jpeg of small exif, 1 MB": jpegs(segment(0xE1, exif + bytes(10)), 10**6),
        "jpeg of small exif": jpegs(segment(0xE1, exif + bytes(10))),
        "jpeg of large exif": jpegs(segment(0xE1, exif + bytes(65_000))),
        "jpeg of photoshop": jpegs(segment(0xED, photoshop)),
        "jpeg of tables": jpegs(segment(0xDB, (b"\0" + b"\1" * 64) * 1008)),
        "jpeg of frame headers": jpegs(segment(0xC0, b"\x08\0\x1e\0\x28\3" + b"\1\x11\0" * 21_000)),
        "png of private chunks": pngs(chunk(b"prIv")),
        "png of texts": pngs(chunk(b"tEXt", b"a\0b")),
        "png of unicode": pngs(chunk(b"iTXt", b"a\0\0\0\0\0b")),
        "png of gammas": pngs(chunk(b"gAMA", b"\0\0\0\1")),
        "png of chunks behind the pixels": filled(png[:-12], chunk(b"prIv"), png[-12:], size),
        "png of empty pixels": filled(png[:pixels], chunk(b"IDAT"), png[pixels:], size),
        "png of damaged texts": pngs(chunk(b"zTXt", damaged)),
        "png of profiles": pngs(chunk(b"iCCP", damaged)),
        "png of much exif": png[:33] + chunk(b"eXIf", directory(65_535)) + png[33:],
        "png of much exif as text": png[:33] + chunk(b"zTXt", text) + png[33:],
        "png of much exif as unicode": png[:33] + chunk(b"iTXt", text[:22] + b"\1\0\0" + text[22:]) + png[33:],
        "gif of comments": filled(gif[:first], b"\x21\xfe\1a\0", gif[first:], size),
        "gif of a comment": filled(gif[:first] + b"\x21\xfe", b"\1a", b"\0" + gif[first:], size),
        "gif of zeros": filled(gif[:first], b"\0", gif[first:], size),
        "gif of zeros behind the pixels": filled(gif[:-1], b"\0", gif[-1:], size),
        "gif of small blocks": filled(gif[:-2], b"\1a", gif[-2:], size),
        "webp of chunks": webp_with(b"abcd\0\0\0\0" * (size // 8 - 100)),
        "webp of much exif": webp_with(b"EXIF" + struct.pack("<I", len(directory(65_534))) + directory(65_534)),
    }


OF_MANY_PARTS = of_many_parts()
# The formats allowed as base64.
OF_MANY_PARTS_IN_BASE64 = of_many_parts(LIMITS.max_data_uri_bytes)


def cpu_seconds_of_refusal(data: bytes) -> float:
    """CPU time of this thread, as other programs may run too: the best of many tries, until it is quick enough."""
    best = float("inf")
    for _ in tries():
        began = time.thread_time()
        refusal(data)
        best = min(best, time.thread_time() - began)
        if best < MAX_CPU_S:
            break
    return best


def refusal(data: bytes, limits: Limits = LIMITS) -> ApiError:
    with pytest.raises(ApiError) as caught:
        images.decode(data, {8}, limits, "images.3", "image 4 of 5")
    error = caught.value
    assert error.status == 400
    assert error.param == "images.3"
    assert error.message.startswith("image 4 of 5: ")
    assert "images.3" not in error.message
    assert "\n" not in error.message
    return error


HOSTILE = {
    "empty": (b"", "unsupported_image"),
    "text": (b"hello" * 100, "unsupported_image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "unsupported_image"),
    "tiff": (picture(format="TIFF"), "unsupported_image"),
    "bmp": (picture(format="BMP"), "unsupported_image"),
    "pdf that calls itself an image": (b"%PDF-1.7 " + picture(), "unsupported_image"),
    "zip before a picture": (b"PK\x03\x04" + picture(), "unsupported_image"),
    "gif that is a page": (b"GIF89a/*<script>alert(1)</script>*/=1;", "broken_image"),
    "gif of a header": (b"GIF89a", "broken_image"),
    "jpeg of a header": (b"\xff\xd8\xff\xe0", "broken_image"),
    "png of a header": (b"\x89PNG\r\n\x1a\n", "broken_image"),
    "webp of a header": (b"RIFF\x04\x00\x00\x00WEBP", "broken_image"),
    "webp of an unknown chunk": (b"RIFF\x20\x00\x00\x00WEBPVP8?" + bytes(30), "broken_image"),
    "png bomb": (png_header(50_000, 50_000), "image_too_large"),
    "png bomb beyond Pillow's limit": (png_header(2**31 - 1, 2**31 - 1), "image_too_large"),
    "png of one long line": (png_header(2**31 - 1, 1), "image_too_large"),
    "png without pixels": (png_header(0, 10), "broken_image"),
    "png that ends early": (png_header(100, 100), "broken_image"),
    "webp bomb": (webp_header(16_000, 16_000), "image_too_large"),
    "truncated png": (picture(size=(200, 200))[:-40], "broken_image"),
    "truncated jpeg": (picture(size=(200, 200), format="JPEG")[:-400], "broken_image"),
    "truncated webp": (picture(size=(200, 200), format="WEBP")[:-60], "broken_image"),
    "jpeg of many scans": (of_many_scans(65), "broken_image"),
    "jpeg of very many scans": (of_many_scans(20_000), "broken_image"),
    "png whose text is called exif": (with_text(exif="6"), "broken_image"),
    "png whose text is called xmp": (with_text(xmp='tiff:Orientation="6"'), "broken_image"),
    "png with a profile that is none": (with_text(**{"Raw profile type exif": "\nexif\n4\nzz"}), "broken_image"),
    "animated gif": (animation("GIF"), "animated_image"),
    "animated png": (animation("PNG"), "animated_image"),
    "animated webp": (animation("WEBP"), "animated_image"),
    **{name: (data, "broken_image") for name, data in OF_MANY_PARTS.items()},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_images_are_refused(name: str) -> None:
    data, code = HOSTILE[name]
    assert refusal(data).code == code


@pytest.mark.nightly  # limits of time and memory; the gate tests that they are refused before decoding
@pytest.mark.parametrize("name", OF_MANY_PARTS)
def test_many_parts_cost_next_to_nothing(name: str) -> None:
    assert cpu_seconds_of_refusal(OF_MANY_PARTS[name]) < MAX_CPU_S
    tracemalloc.start()
    try:
        refusal(OF_MANY_PARTS[name])
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()


def test_images_of_more_parts_than_usual_are_taken() -> None:
    jpeg, png, gif = (picture(size=(200, 200), format=format) for format in ("JPEG", "PNG", "GIF"))
    noise = Image.frombytes("L", (1000, 1000), random.Random(0).randbytes(10**6))
    buffer = io.BytesIO()
    noise.save(buffer, "GIF", comment=b"x" * 50_000)
    pixels, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    packed = png[pixels + 8 : end - 4]
    for data in (
        # Like a long profile, much XMP, a camera's padding, and an EXIF in two segments.
        jpeg[:2] + segment(0xE2, b"ICC_PROFILE\0" + bytes(60_000)) * 100 + jpeg[2:],
        jpeg[:2] + segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000)) * 100 + jpeg[2:],
        jpeg[:2] + segment(0xE5) * 900 + b"\xff" * 30_000 + jpeg[2:],
        jpeg[:2]
        + segment(0xE1, b"Exif\0\0" + directory(5_000))
        + segment(0xE1, b"Exif\0\0" + bytes(65_000))
        + jpeg[2:],
        png[:33] + chunk(b"tEXt", b"a\0b") * 900 + png[33:],
        png[:pixels] + b"".join(chunk(b"IDAT", bytes([byte])) for byte in packed) + png[end:],
        buffer.getvalue(),
        # Ten megabytes of pixels, in blocks as encoders write them.
        filled(gif[:-2], b"\xff" + bytes(255), gif[-2:]),
    ):
        (pixels_here,) = images.decode(data, {8}, LIMITS, "x").values()
        assert np.array_equal(pixels_here, resize_image(decode_image(data, name="x"), 8))
        if len(data) <= LIMITS.max_data_uri_bytes:
            assert images.from_data_uri(data_uri(data), LIMITS, "x") == data


@pytest.mark.parametrize(
    "name",
    ["png bomb", "webp bomb", "jpeg of many scans", "animated gif", "animated png", "animated webp", *OF_MANY_PARTS],
)
def test_they_are_refused_before_anything_is_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "decode_image", lambda *args, **kwargs: pytest.fail("it was decoded"))
    refusal(HOSTILE[name][0])


def test_the_limits_are_those_that_are_set() -> None:
    data = picture(size=(40, 30))
    assert images.decode(data, {8}, dataclasses.replace(LIMITS, max_pixels=1200), "x")
    past = refusal(data, dataclasses.replace(LIMITS, max_pixels=1199)).message
    assert past == "image 4 of 5: 0.01 megapixels (40 x 30); an image may have 0.001199"
    past = refusal(png_header(5001, 5000)).message
    assert past == "image 4 of 5: 25.01 megapixels (5001 x 5000); an image may have 25"
    assert refusal(data, dataclasses.replace(LIMITS, max_image_bytes=len(data) - 1)).code == "image_too_large"
    assert images.decode(animation("GIF"), {8}, dataclasses.replace(LIMITS, max_frames=3), "x")
    refusal(animation("GIF"), dataclasses.replace(LIMITS, max_frames=2))


def test_a_gif_of_very_many_frames_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    still = animation("GIF")
    # The second and third frame repeated: a megabyte of frames that must not be parsed.
    end = still.rindex(b"\x3b")
    start = still.index(b"\x21\xf9", still.index(b"\x2c") + 1)
    many = still[:end] + still[start:end] * 20_000 + b"\x3b"
    seeks: list[int] = []
    seek = GifImagePlugin.GifImageFile.seek
    monkeypatch.setattr(
        GifImagePlugin.GifImageFile, "seek", lambda image, frame: (seeks.append(frame), seek(image, frame))[1]
    )
    assert refusal(many).code == "animated_image"
    assert len(seeks) <= 3


def test_text_in_a_png_does_not_fill_the_memory() -> None:
    images.harden_pillow()
    chunks = PngImagePlugin.PngInfo()
    for index in range(30):
        chunks.add_text(f"key{index}", "x" * 1_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10)).save(buffer, "PNG", pnginfo=chunks)
    assert len(buffer.getvalue()) < 100_000
    assert refusal(buffer.getvalue()).code == "broken_image"


def exif_rotated() -> bytes:
    """Red above blue after the rotation by its EXIF; stored sideways."""
    upright = Image.new("RGB", (60, 40), COLOURS["red"])
    upright.paste(COLOURS["blue"], (0, 20, 60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.rotate(90, expand=True).save(buffer, "JPEG", quality=95, exif=exif)
    return buffer.getvalue()


def test_a_photograph_stands_upright() -> None:
    (pixels,) = images.decode(exif_rotated(), {16}, LIMITS, "x").values()
    assert np.abs(pixels[:6].reshape(-1, 3).mean(0) - COLOURS["red"]).max() < 12
    assert np.abs(pixels[-6:].reshape(-1, 3).mean(0) - COLOURS["blue"]).max() < 12


def test_what_else_the_exif_says_is_of_no_concern() -> None:
    """Rewriting EXIF without the orientation fails if a value has a type that its tag does not allow."""
    for entries in (
        [ON_ITS_SIDE, (0x011A, 7, 4, b"abcd")],
        [ON_ITS_SIDE, (0x011A, 5, 2**31, b"abcd")],
        [ON_ITS_SIDE, (0x8769, 4, 1, struct.pack("<i", -5))],
    ):
        (pixels,) = images.decode(with_exif(*entries), {16}, LIMITS, "x").values()
        assert pixels.shape == (16, 16, 3)
        assert decode_image(with_exif(*entries), name="x").size == (30, 40), "it was not turned"


def test_whatever_the_exif_holds_it_is_an_image_or_refused() -> None:
    chance = random.Random(0)
    for _ in range(300):
        tags = (0x0112, 0x011A, 0x8769, 0x8825, chance.randrange(2**16))
        entries = [
            (chance.choice(tags), chance.randrange(14), chance.choice((0, 1, 2, chance.randrange(2**32))), value)
            for value in (chance.randbytes(4) for _ in range(chance.randrange(1, 6)))
        ]
        with contextlib.suppress(ApiError):
            images.decode(with_exif(ON_ITS_SIDE, *entries), {8}, LIMITS, "x")


def test_photographs_of_many_scans_or_with_something_behind_them_are_taken() -> None:
    assert images.decode(of_many_scans(64), {8}, LIMITS, "x")
    # Phones append a video to a picture. In that many random bytes a scan marker occurs by chance.
    film = random.Random(0).randbytes(8 * 2**20)
    assert film.count(b"\xff\xda") > 64
    assert images.decode(picture(format="JPEG") + film, {8}, LIMITS, "x")


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "P", "RGBA", "1", "I;16"])
def test_every_kind_of_pixel_becomes_rgb_as_in_the_bulk_jobs(mode: str) -> None:
    format = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new("L", (20, 20), 128).convert(mode) if mode != "I;16" else Image.new("I;16", (20, 20), 128 * 257)
    buffer = io.BytesIO()
    image.save(buffer, format)
    (pixels,) = images.decode(buffer.getvalue(), {8}, LIMITS, "x").values()
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, resize_image(decode_image(buffer.getvalue(), name="x"), 8))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_one_decoding_gives_every_size(format: str) -> None:
    data = picture("green", (50, 40), format)
    found = images.decode(data, {8, 24}, LIMITS, "x")
    assert {size: pixels.shape for size, pixels in found.items()} == {8: (8, 8, 3), 24: (24, 24, 3)}


ADDRESSES = [
    "http://127.0.0.1/x.png", "https://example.com/x.png", "//example.com/x.png", "file:///etc/passwd", "ftp://x/y",
    "HTTP://169.254.169.254/latest/meta-data/", "gopher://x", "/etc/passwd", "../../etc/passwd", "s3://bucket/key",
    "javascript:alert(1)", "blob:x", "x", "",
]  # fmt: skip


@pytest.mark.parametrize("uri", ADDRESSES)
def test_addresses_are_not_fetched(uri: str) -> None:
    with pytest.raises(ApiError) as caught:
        images.from_data_uri(uri, LIMITS, "images.0")
    assert caught.value.code == "unsupported_url"


@pytest.mark.parametrize(
    "uri",
    [
        "data:,", "data:image/png,abc", "data:image/png;base64", "data:text/html;base64,aGk=", "data:;base64,aGk=",
        "data:image/png;base64,a", "data:image/png;base64,a===", "data:image/png;base64,aGk=aGk=",
        "data:image/png;base64,%61", "data:image/png;base64,aG k=", "data:image/png;base64,\u00e9\u00e9\u00e9\u00e9",
        "data:image/png;base64;x,aGk=",
    ],
)  # fmt: skip
def test_data_uris_have_one_form(uri: str) -> None:
    with pytest.raises(ApiError) as caught:
        images.from_data_uri(uri, LIMITS, "images.0")
    assert caught.value.code == "invalid_data_uri"


def test_a_data_uri_is_bounded_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images.binascii, "a2b_base64", lambda *args, **kwargs: pytest.fail("it was unpacked"))
    with pytest.raises(ApiError, match=r"the image: too large; an image may have 2.93 KiB as base64"):
        images.from_data_uri(
            "data:image/png;base64," + "A" * 4008, dataclasses.replace(LIMITS, max_image_bytes=3000), "x"
        )


@pytest.mark.parametrize("name", ["jpeg of filling", "jpeg of markers"])
def test_a_long_data_uri_is_refused_by_its_beginning(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, unpacked = images.binascii.a2b_base64, []
    monkeypatch.setattr(
        images.binascii, "a2b_base64", lambda text, **kwargs: unpacked.append(len(text)) or unpack(text, **kwargs)
    )
    with pytest.raises(ApiError) as caught:
        images.from_data_uri(data_uri(OF_MANY_PARTS_IN_BASE64[name]), LIMITS, "x")
    assert caught.value.code == "broken_image"
    assert sum(unpacked) < len(OF_MANY_PARTS_IN_BASE64[name]) / 40


def test_a_data_uri_gives_its_bytes() -> None:
    data = picture()
    assert images.from_data_uri(data_uri(data), LIMITS, "x") == data
    assert images.from_data_uri("DATA:image/PNG;BASE64," + base64.b64encode(data).decode(), LIMITS, "x") == data
    long = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        Image.fromarray(long).save(stream := io.BytesIO(), kind, **({} if kind == "GIF" else {"quality": 100}))
        assert len(stream.getvalue()) > 2**17
        assert images.from_data_uri(data_uri(stream.getvalue()), LIMITS, "x") == stream.getvalue()


def test_no_code_of_ours_can_fetch() -> None:
    """Nothing in serve/ imports a module that opens connections to addresses chosen by a client."""
    root = Path(images.__file__).parent
    for path in root.glob("*.py"):
        text = path.read_text()
        for name in ("urllib.request", "http.client", "import requests", "import httpx", "aiohttp", "urlopen"):
            assert name not in text, f"{path.name} uses {name}"
