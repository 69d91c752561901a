"""The one door for picture files: which formats are opened, how large they may be, which way up they are.

Pillow alone looks for any format it knows, whatever the file is called, and some of those start programs (EPS runs
Ghostscript). Worker processes of ``smalto prepare`` import this module, so it does not import torch.
"""

import io
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError, features

from smalto.data.foreign import open_plain, reason
from smalto.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
"""All that is opened, by the content of a file; AVIF where Pillow was built with it."""

MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 2**30 // 12
"""Of a picture: Pillow's own limit for opening one without complaint."""
MAX_BYTES = 3 * MAX_PIXELS
"""Of a picture's decoded pixels, width x height x channels x bytes each: the largest 8-bit RGB picture."""
MAX_FILE = 2**28
"""Bytes of a picture file."""

_CHANNELS = {"1": 1, "L": 1, "P": 1, "I": 4, "F": 4, "LA": 2, "PA": 2, "La": 2, "RGBA": 4, "RGBa": 4, "CMYK": 4}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(data: bytes) -> Image.Image:
    """An encoded picture, its header read and its size found bearable; the pixels are not decoded yet.

    Raises:
        ValueError: none of the formats, damaged, or too large.
    """
    if not data:
        raise InputError("not a readable picture: the file is empty")
    check_file_size(len(data))
    formats = [name for name in FORMATS if name != "AVIF" or features.check("avif")]
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        needed = width * height * _bytes_per_pixel(image)
    except UnidentifiedImageError:
        raise InputError(f"not a readable picture: damaged at its start, or none of {', '.join(formats)}") from None
    except Exception as error:  # Pillow's plugins raise all there is on damaged files
        raise InputError(f"not a readable picture: {reason(error)}") from error
    if min(width, height) < 1:
        raise InputError(f"not a readable picture: it has {width}x{height} pixels")
    if width * height > MAX_PIXELS or needed > MAX_BYTES:
        raise InputError(
            f"{width}x{height} pixels, {width * height} pixels in mode {image.mode}, are {needed} bytes when decoded; "
            f"the limits are {MAX_PIXELS} pixels and {MAX_BYTES} bytes: make it smaller"
        )
    return image


def read_picture_file(path: Path) -> bytes:
    """The bytes of a picture file.

    Raises:
        OSError: it cannot be read.
        ValueError: no plain file (a pipe or a device would never end), or larger than any picture.
    """
    with open_plain(path) as file:
        check_file_size(os.fstat(file.fileno()).st_size)
        return file.read()


def check_file_size(size: int) -> None:
    """Refuse a picture file of so many bytes before it is read, if that is too much."""
    if size > MAX_FILE:
        raise InputError(f"the file has {size} bytes, a picture may have {MAX_FILE}")


def is_upright(image: Image.Image) -> bool:
    """Whether nothing says that the picture is to be turned."""
    return _turn(image) is None


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF block says. Nothing else of that block is looked at; one that is damaged counts as none."""
    image.load()  # first: TIFF turns itself then
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation: Any = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever a foreign block makes Pillow raise
        return None
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _bytes_per_pixel(image: Image.Image) -> int:
    """What a pixel of the file takes; Pillow's plugins write 16 bits a channel as ``;16`` in mode or raw mode."""
    channels = _CHANNELS.get(image.mode, 2 if image.mode.startswith("I;16") else 3)
    tiles = getattr(image, "tile", None)
    raw = str(tiles[0][3]) if tiles else ""
    return channels * 2 if ";16" in raw and not image.mode.startswith("I") else channels
