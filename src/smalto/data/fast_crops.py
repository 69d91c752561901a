"""The crops of training resized by torch instead of Pillow: a third of the time, nearly the same pixels."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from smalto.data.transforms import drawn_short_side


def resize_short_side(image: Image.Image, size: int) -> Tensor:
    """As :func:`smalto.data.transforms.resize_short_side`, to uint8 (3, H, W), by torch's antialiased bicubic filter.

    It is Pillow's filter with other rounding: on photographs about one value in 200 differs, by 1 or 2 of 255.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    shape = (round(image.height * scale), round(image.width * scale))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == shape:
        return pixels
    return interpolate(pixels[None], shape, mode="bicubic", antialias=True)[0]


def center_crop(image: Image.Image, size: int) -> Tensor:
    """As :func:`smalto.data.transforms.center_crop`: uint8 (3, size, size)."""
    pixels = resize_short_side(image, size)
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    return pixels[:, top : top + size, left : left + size]


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
    """As :func:`smalto.data.transforms.random_crop`, the same place and scale: uint8 (3, size, size)."""
    pixels = resize_short_side(image, drawn_short_side(size, rng))
    left = int(rng.integers(pixels.shape[2] - size + 1))
    top = int(rng.integers(pixels.shape[1] - size + 1))
    return pixels[:, top : top + size, left : left + size]
