"""One source record to the members of a shard: decode, resize, encode. Runs in workers, without torch."""

import io
import math
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from smalto.data.foreign import reason
from smalto.data.pictures import MAX_PIXELS, is_upright, open_picture
from smalto.data.sources import Record
from smalto.data.transforms import center_crop, decode_image, pad_to, resize_short_side, to_rgb
from smalto.errors import InputError

Resize = Literal["keep", "center_crop", "short_side", "pad"]
Encoding = Literal["png", "jpg", "webp"]

_PILLOW_FORMAT = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}

_RUNS_ONLY = {"compress_level": 1, "compress_type": 3}  # zlib's Z_RLE


@dataclass(frozen=True)
class Recipe:
    """How images are stored.

    What all recipes have in common: pictures become upright 8-bit RGB (``to_rgb`` says how grey, palette, transparent,
    CMYK and 16-bit ones do; of an animation the first frame counts). Small images are enlarged, down to a single
    pixel, unless ``min_side`` leaves them out. Rejected are: damaged and truncated files, formats that
    ``smalto.data.pictures`` does not open, float pixels, more than 89 million pixels or 268 million bytes of them,
    images so long and narrow that they would exceed that number of pixels after resizing, and sides beyond the
    encoding's (65,500 for jpg, 16,383 for webp).

    Args:
        resize: ``keep`` the size; ``center_crop`` to a square (ADM); ``short_side`` to ``image_size``, aspect
            kept; ``pad`` with black to a square.
        image_size: side in pixels; None with ``keep``.
        encoding: ``png`` and ``webp`` are lossless, ``jpg`` is not.
        quality: ``jpg``: 1..100; ``png``: zlib level 0..9, or -1 for runs of equal bytes only (much
            faster for photographs, some 5 % larger); ``webp``: effort 0..6 (files get smaller, not
            better).
        min_side: images with a shorter side are rejected.

    Raises:
        ValueError: an unknown word, a quality outside its range, or a size that is missing or not used.
    """

    resize: Resize
    image_size: int | None
    encoding: Encoding
    quality: int
    min_side: int = 1

    def __post_init__(self) -> None:
        problems = []
        if self.resize not in ("keep", "center_crop", "short_side", "pad"):
            problems.append(f"resize is {self.resize!r}, must be keep, center_crop, short_side or pad")
        elif self.resize == "keep" and self.image_size is not None:
            problems.append(
                f"image_size is {self.image_size} but resize=keep leaves images as they are: "
                "set resize=center_crop, short_side or pad"
            )
        elif self.resize != "keep" and (self.image_size is None or self.image_size < 1):
            problems.append(f"resize={self.resize} needs image_size, the side in pixels; it is {self.image_size}")
        elif self.image_size is not None and self.image_size**2 > MAX_PIXELS:
            problems.append(f"image_size is {self.image_size}, must be at most {math.isqrt(MAX_PIXELS)}")
        limits = {"jpg": (1, 100), "png": (-1, 9), "webp": (0, 6)}
        if self.encoding not in limits:
            problems.append(f"encoding is {self.encoding!r}, must be png, jpg or webp")
        elif not limits[self.encoding][0] <= self.quality <= limits[self.encoding][1]:
            low, high = limits[self.encoding]
            problems.append(f"quality is {self.quality}, must be in {low}..{high} for {self.encoding}")
        if self.min_side < 1:
            problems.append(f"min_side is {self.min_side}, must be at least 1 pixel")
        if problems:
            raise InputError("prepare: " + "; ".join(problems))


@dataclass(frozen=True)
class Item:
    """A record on its way to a shard: where it goes, and what was read, or why it could not be."""

    key: str
    name: str
    record: Record | None
    reason: str = ""


@dataclass(frozen=True)
class Encoded:
    """Members of one image; ``data`` is None when the image was rejected for ``reason``."""

    key: str
    name: str
    data: bytes | None
    size: tuple[int, int]  # height, width
    label: int | None
    caption: str | None
    reason: str = ""


@dataclass(frozen=True)
class EncodeChunk:
    """The pickled function of the workers: a list of items to a list of results."""

    recipe: Recipe

    def __call__(self, items: list[Item]) -> list[Encoded]:
        """Encode each; damaged images come back rejected, never dropped."""
        return [encode(item, self.recipe) for item in items]


def encode(item: Item, recipe: Recipe) -> Encoded:
    """One item by ``recipe``."""
    if item.record is None:
        return Encoded(item.key, item.name, None, (0, 0), None, None, item.reason)
    try:
        data, size = _encode_image(item.record.image, recipe)
    except ValueError as error:
        return Encoded(item.key, item.name, None, (0, 0), None, None, str(error))
    return Encoded(item.key, item.name, data, size, item.record.label, item.record.caption)


def _encode_image(source: Image.Image | bytes, recipe: Recipe) -> tuple[bytes, tuple[int, int]]:
    image = decode_image(source) if isinstance(source, bytes) else to_rgb(source)
    if min(image.size) < recipe.min_side:
        raise InputError(f"{image.width}x{image.height} pixels, min_side is {recipe.min_side}")
    if recipe.resize == "keep" and isinstance(source, bytes) and _is_stored_form(source, recipe):
        return source, (image.height, image.width)  # decoded all the same: that is the check for damage
    side = recipe.image_size
    if side is not None:
        long = max(image.size) * side // min(image.size)
        if recipe.resize != "pad" and long * side > MAX_PIXELS:
            raise InputError(
                f"{image.width}x{image.height} pixels: with its short side at {side} the long one is {long}, more than "
                f"{MAX_PIXELS} pixels in all; crop it first"
            )
        resize = {"center_crop": center_crop, "short_side": resize_short_side, "pad": pad_to}[recipe.resize]
        image = resize(image, side)
    buffer = io.BytesIO()
    options = {
        "png": {"compress_level": recipe.quality} if recipe.quality >= 0 else _RUNS_ONLY,
        "jpg": {"quality": recipe.quality},
        "webp": {"lossless": True, "method": recipe.quality, "quality": 50},
    }[recipe.encoding]
    try:
        image.save(buffer, _PILLOW_FORMAT[recipe.encoding], **options)
    except Exception as error:  # what a picture brings along, such as a colour profile, is stored too
        size = f"{image.width}x{image.height}"
        raise InputError(f"{size} pixels do not fit into {recipe.encoding}: {reason(error)}") from error
    return buffer.getvalue(), (image.height, image.width)


def _is_stored_form(data: bytes, recipe: Recipe) -> bool:
    """Whether a file may stay as it is: right format, plain RGB, upright. Saves JPEGs a second loss."""
    image = open_picture(data)
    if image.format != _PILLOW_FORMAT[recipe.encoding] or getattr(image, "n_frames", 1) != 1:
        return False
    return image.mode == "RGB" and "transparency" not in image.info and is_upright(image)
