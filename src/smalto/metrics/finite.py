"""A number that is none must not become a score: asked once, when a metric is computed."""

import torch
from torch import Tensor

from smalto.errors import InputError

FEATURES = "features of generated images are not finite"
LOGITS = "logits of generated images are not finite"


def all_finite(*tensors: Tensor) -> bool:
    """Whether nothing in them is NaN or infinite; one fetch from the device."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def check_finite(what: str, *tensors: Tensor) -> None:
    """Refuse what is not finite.

    Raises:
        ValueError: NaN or infinite numbers in ``what``.
    """
    if not all_finite(*tensors):
        broken = sum(int((~tensor.isfinite()).sum()) for tensor in tensors)
        raise InputError(
            f"{what} hold {broken} numbers that are not finite (NaN or infinite), so that every metric against them "
            "would be wrong; measure them again, with intact weights of the extractor"
        )
