"""Every kind of picture file, through the encoder of ``smalto prepare``: what it becomes, or why it is left out."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from smalto.data.encode import Encoded, Item, Recipe, encode
from smalto.data.sources import Record


def through(data: bytes | Image.Image, recipe: Recipe | None = None) -> Encoded:
    item = Item("00000000", "name", Record(image=data, name="name"))
    return encode(item, recipe or Recipe("keep", None, "png", 1))


def pixels(result: Encoded) -> np.ndarray:
    assert result.data is not None, result.reason
    with Image.open(io.BytesIO(result.data)) as image:
        assert image.mode == "RGB"
        return np.asarray(image)


def file(image: Image.Image, image_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png16(channels: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write: colour type 2 (RGB) or 0 (grey)."""
    height, width, depth = channels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if depth == 3 else 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def palette() -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 8, 7])
    return image


def turned() -> bytes:
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    return file(image, "PNG", exif=exif)


FILES = {
    "grey": (file(Image.new("L", (2, 2), 90), "PNG"), (90, 90, 90)),
    "black and white": (file(Image.new("1", (2, 2), 1), "PNG"), (255, 255, 255)),
    "palette": (file(palette(), "PNG"), (9, 8, 7)),
    "palette, transparent": (file(palette(), "PNG", transparency=1), (255, 255, 255)),
    "half transparent": (file(Image.new("RGBA", (2, 2), (0, 100, 0, 128)), "PNG"), (127, 177, 127)),
    "grey and alpha": (file(Image.new("LA", (2, 2), (10, 0)), "PNG"), (255, 255, 255)),
    "16-bit grey": (png16(np.full((2, 2, 1), 257 * 100)), (100, 100, 100)),
    "16-bit colour": (png16(np.tile([257 * 10, 257 * 20, 257 * 30], (2, 2, 1))), (10, 20, 30)),
    "cmyk tiff": (file(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "cmyk jpeg": (file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100), (255, 0, 0)),
    "animation": (
        file(Image.new("RGB", (2, 2), (250, 0, 0)), "GIF", save_all=True, append_images=[Image.new("RGB", (2, 2))]),
        (250, 0, 0),
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_becomes_rgb(kind):
    data, expected = FILES[kind]
    assert tuple(pixels(through(data))[0, 0]) == expected


def test_rotation_by_exif_is_carried_out():
    found = pixels(through(turned()))
    assert found.shape == (4, 2, 3)
    assert found[0, 1].tolist() == [255, 255, 255]  # the top left corner, turned clockwise
    assert found.sum() == 3 * 255


def test_a_single_pixel_is_enlarged():
    recipe = Recipe("center_crop", 16, "png", 1)
    assert (pixels(through(file(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), recipe)) == [1, 2, 3]).all()
    assert through(Image.new("RGB", (1, 1)), Recipe("keep", None, "png", 1)).size == (1, 1)
    refused = through(Image.new("RGB", (1, 9)), Recipe("center_crop", 16, "png", 1, min_side=2))
    assert (refused.data, refused.reason) == (None, "1x9 pixels, min_side is 2")
    kept = through(file(Image.new("RGB", (1, 9)), "PNG"), Recipe("keep", None, "png", 1, min_side=2))
    assert kept.data is None


@pytest.mark.parametrize("resize", ["center_crop", "short_side"])
def test_a_long_thread_does_not_fill_the_memory(resize):
    result = through(Image.new("RGB", (1, 30_000)), Recipe(resize, 256, "jpg", 95))
    assert result.data is None
    assert result.reason.startswith("1x30000 pixels: with its short side at 256 the long one is 7680000")
    assert through(Image.new("RGB", (2, 400)), Recipe(resize, 64, "jpg", 95)).data is not None


@pytest.mark.parametrize(("encoding", "side"), [("jpg", 65_501), ("webp", 16_384)])
def test_sides_beyond_the_encoding_are_refused(encoding, side):
    result = through(Image.new("RGB", (side, 1)), Recipe("keep", None, encoding, 1))
    assert result.data is None
    assert f"do not fit into {encoding}" in result.reason


def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded():
    def claims(width, height):
        data = bytearray(file(Image.new("RGB", (1, 1)), "PNG"))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    result = through(claims(60_000, 60_000))
    assert result.data is None
    assert "3600000000 pixels" in result.reason


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_file_cut_short_is_refused_not_filled_with_grey(image_format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = file(noise, image_format)
    result = through(data[: len(data) * 2 // 3])
    assert result.data is None
    assert "not a readable picture" in result.reason


def test_float_pixels_are_refused():
    result = through(file(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))
    assert "float pixels" in result.reason
