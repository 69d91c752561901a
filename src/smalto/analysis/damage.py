"""Ways to damage real images, each with one knob whose zero is no damage: pure functions of uint8 batches."""

import io
import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import gaussian_blur

from smalto.data.transforms import decode_image
from smalto.errors import InputError


def blur(image: Tensor, *, sigma: float) -> Tensor:
    """Gaussian blur of uint8 (N, 3, H, W), reflected at the edges.

    Args:
        image: not modified.
        sigma: in pixels; 0 changes nothing.

    Raises:
        ValueError: a kernel of 3 sigma that does not fit the image.
    """
    radius = math.ceil(3 * sigma)
    if not 0 <= radius < min(image.shape[-2:]):
        raise InputError(
            f"sigma is {sigma} px; 3 sigma must be >= 0 and less than the image's {min(image.shape[-2:])} px"
        )
    return gaussian_blur(image, kernel_size=[2 * radius + 1] * 2, sigma=[sigma] * 2) if sigma else image.clone()


def noise(image: Tensor, *, std: float, generator: torch.Generator) -> Tensor:
    """Independent Gaussian noise on every value of uint8 (N, 3, H, W), rounded and cut to [0, 255].

    Args:
        image: not modified.
        std: in grey levels; 0 changes nothing.
        generator: one in the same state gives the same noise, larger or smaller with ``std``.

    Raises:
        ValueError: a negative std.
    """
    if std < 0:
        raise InputError(f"std is {std}, must be >= 0 (grey levels)")
    added = std * torch.randn(image.shape, generator=generator)
    return (image + added).round_().clamp_(0, 255).byte()


def jpeg(image: Tensor, *, loss: int) -> Tensor:
    """Uint8 (N, 3, H, W) through JPEG and back, chroma halved as usual.

    Args:
        image: not modified.
        loss: 100 minus the quality that PIL is asked for, 1 to 99; 0 does not encode at all.

    Raises:
        ValueError: another loss.
    """
    if not 0 <= loss < 100:
        raise InputError(f"loss is {loss}, must be 0 to 99 (100 minus JPEG quality)")
    return torch.stack([_recoded(picture, quality=100 - loss) for picture in image]) if loss else image.clone()


def drop_classes(image: Tensor, label: Tensor, *, num_dropped: int, num_images: int) -> Tensor:
    """The first images of all classes but the last ones: distinct and untouched, with modes missing.

    They are drawn from more images than are returned. To fill up with copies instead would add the damage of
    `duplicate`: four copies of each image make every ball of its manifold a point.

    Args:
        image: uint8 (M, 3, H, W).
        label: (M,).
        num_dropped: classes left out, the highest labels.
        num_images: N to return.

    Returns:
        Uint8 (N, 3, H, W), in the order they were in; with ``num_dropped`` 0 ``image[:N]``.

    Raises:
        ValueError: no class would be left, or fewer than N images are.
    """
    classes = label.unique()
    if not 0 <= num_dropped < len(classes):
        raise InputError(f"num_dropped is {num_dropped}; of {len(classes)} classes drop 0 to {len(classes) - 1}")
    kept = image[torch.isin(label, classes[: len(classes) - num_dropped])]
    if len(kept) < num_images:
        raise InputError(
            f"{len(classes) - num_dropped} of {len(classes)} classes hold {len(kept)} images, {num_images} are "
            "needed; drop fewer classes, ask for fewer images or bring more"
        )
    return kept[:num_images]


def duplicate(image: Tensor, *, share: float) -> Tensor:
    """Uint8 (N, 3, H, W) of which ``share`` are copies of the others, copied equally often, give or take one.

    Args:
        image: its first ``N (1 - share)`` images, at least one, are repeated.
        share: in [0, 1); 0 changes nothing.

    Raises:
        ValueError: share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise InputError(f"share is {share}, must be in [0, 1)")
    distinct = max(1, round(len(image) * (1 - share)))
    return image[torch.arange(len(image)) % distinct]


def _recoded(picture: Tensor, *, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "jpeg", quality=quality)
    return torch.from_numpy(np.array(decode_image(file.getvalue()))).permute(2, 0, 1)
