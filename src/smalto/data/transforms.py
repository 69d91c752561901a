"""Pixels: ranges in one place, the crops of ADM and LlamaGen, any picture to RGB.

Worker processes of ``smalto prepare`` import this module, so it does not import torch (tensors bring their
methods along).
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from smalto.data.foreign import reading
from smalto.data.pictures import open_picture, upright
from smalto.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FIVE_CROPS = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
TEN_CROPS = (*FIVE_CROPS, *(f"{name}_flip" for name in FIVE_CROPS))
"""Names of the ten crops in the order of the official extraction (torchvision's ``TenCrop``)."""

MAX_CROP_FRAC, MIN_CROP_FRAC = 1.0, 0.8


def to_float(image: "Tensor") -> "Tensor":
    """Integer pixels in [0, 255] to float32 in [-1, 1]; any shape."""
    return image.float().div_(127.5).sub_(1.0)


def to_uint8(image: "Tensor", rounding: Literal["nearest", "truncate"] = "nearest") -> "Tensor":
    """Float pixels, about [-1, 1], to uint8; values outside are clamped.

    Args:
        image: any shape and float dtype; computed in float32.
        rounding: ``nearest`` rounds ``127.5 x + 127.5``, halves away from zero. ``truncate`` is the official
            ``clamp(127.5 x + 128, 0, 255)`` cut off: equal up to float rounding at a half.

    Raises:
        ValueError: unknown ``rounding``.
    """
    if rounding == "nearest":
        return image.float().mul(127.5).add_(127.5).add_(0.5).floor_().clamp_(0, 255).byte()
    if rounding == "truncate":
        return image.float().mul(127.5).add_(128.0).clamp_(0, 255).byte()
    raise InputError(f"rounding is {rounding!r}; it must be nearest or truncate")


Rounding = Literal["nearest", "truncate"]
"""Of pixels: to the nearest, or 127.5 x + 128 cut off, as the authors do."""


def to_pixels(image: "Tensor", *, size: int | None = None, rounding: Rounding = "nearest") -> "Tensor":
    """Float pictures (B, 3, H, W), about [-1, 1], to uint8, resized before rounding if asked.

    Args:
        image: any float dtype.
        size: side of the result, by bicubic interpolation without antialiasing: how the LlamaGen authors bring what
            was made at 384 or 512 px to the 256 px of the reference. It aliases and overshoots; it is theirs.
        rounding: see :func:`to_uint8`.

    Raises:
        ValueError: NaN or infinite pixels, which would become some colour without a word.
    """
    if not bool(image.isfinite().all()):
        bad = int((~image.flatten(1).isfinite().all(dim=1)).sum())
        raise InputError(
            f"{bad} of {len(image)} images hold NaN or infinite pixels: the weights are broken, or overflow"
        )
    if size is not None and (size, size) != tuple(image.shape[-2:]):
        from torch.nn.functional import interpolate  # not at the top: see the header

        image = interpolate(image.float(), size=(size, size), mode="bicubic")
    return to_uint8(image, rounding)


def resize_short_side(image: Image.Image, size: int) -> Image.Image:
    """Short side to ``size`` as ADM does: halved by BOX while at least twice too large, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: short side to ``size``, then the central square, offsets rounded down."""
    image = resize_short_side(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    min_frac: float = MIN_CROP_FRAC,
    max_frac: float = MAX_CROP_FRAC,
) -> Image.Image:
    """A square of ``size`` at a random place and scale, as the official tokenizer training draws it.

    The short side becomes an integer drawn uniformly from ``ceil(size / max_frac) .. ceil(size / min_frac)``
    (256..320 for 256), so the square covers between ``min_frac`` and ``max_frac`` of it.
    """
    image = resize_short_side(image, drawn_short_side(size, rng, min_frac, max_frac))
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def drawn_short_side(
    size: int, rng: np.random.Generator, min_frac: float = MIN_CROP_FRAC, max_frac: float = MAX_CROP_FRAC
) -> int:
    """To what :func:`random_crop` scales the short side."""
    smallest, largest = math.ceil(size / max_frac), math.ceil(size / min_frac)
    return int(rng.integers(smallest, largest + 1))


def named_crops(image: Image.Image, size: int, crop_range: float, names: Sequence[str]) -> np.ndarray:
    """The crops called ``names`` (of ``TEN_CROPS``) as uint8 (len(names), size, size, 3).

    The image is first centre-cropped to ``int(size * crop_range)``; the ``_flip`` crops are taken at the same
    places of the mirrored image, which for an odd margin is not the mirrored crop.
    """
    outer = int(size * crop_range)
    margin = outer - size
    middle = round(margin / 2.0)  # torchvision rounds halves to even here
    offsets = dict(zip(FIVE_CROPS, [(0, 0), (0, margin), (margin, 0), (margin, margin), (middle, middle)], strict=True))
    pixels = np.asarray(center_crop(image, outer))
    mirrored = pixels[:, ::-1]
    crops = np.empty((len(names), size, size, 3), np.uint8)
    for crop, name in zip(crops, names, strict=True):
        top, left = offsets[name.removesuffix("_flip")]
        crop[:] = (mirrored if name.endswith("_flip") else pixels)[top : top + size, left : left + size]
    return crops


def ten_crops(image: Image.Image, size: int, crop_range: float) -> np.ndarray:
    """All ten crops in the order of ``TEN_CROPS``: uint8 (10, size, size, 3) from an RGB image."""
    return named_crops(image, size, crop_range, TEN_CROPS)


def pad_to(image: Image.Image, size: int) -> Image.Image:
    """Centre on a black square of ``size``, pixels unchanged.

    Raises:
        ValueError: a side is longer than ``size``.
    """
    if max(image.size) > size:
        raise InputError(
            f"the image is {image.width}x{image.height}; padding to {size} needs sides of at most {size}; "
            "use resize=center_crop"
        )
    canvas = Image.new(image.mode, (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture to upright 8-bit RGB.

    EXIF rotation is applied; transparency (alpha channel or transparent colour) is laid on white; grey,
    palette, CMYK, YCbCr, LAB and HSV convert by Pillow; 16-bit grey is scaled by 1/257, rounded.

    Raises:
        ValueError: float pixels, whose range nothing states.
    """
    image = upright(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise InputError("the image holds float pixels of unknown range; convert it to 8 or 16 bit first")
    if image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


_STRIP = 2**20  # pixels that are converted together: all of a large picture would take many times its size


def _eight_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values in [0, 65535], clipped to it, to uint8."""
    result = np.empty(grey.shape, np.uint8)
    rows = max(1, _STRIP // grey.shape[1])
    for top in range(0, len(grey), rows):
        part = np.clip(grey[top : top + rows].astype(np.int64), 0, 65535)
        result[top : top + rows] = (part * 255 + 32767) // 65535
    return result


def _on_white(image: Image.Image) -> Image.Image:
    result = Image.new("RGB", image.size)
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        # premultiplied modes convert to RGB only by way of their plain partner
        strip = strip.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return result


def decode_image(data: bytes) -> Image.Image:
    """An encoded picture to upright 8-bit RGB, decoded completely.

    Raises:
        ValueError: the bytes are no picture of a format that is opened, are cut short, or are too many when decoded.
    """
    image = open_picture(data)
    with reading("not a readable picture"):
        return to_rgb(image)
