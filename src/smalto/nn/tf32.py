"""TF32: products of float32 on tensor cores (Ampere and later) with 10 bits of mantissa instead of 23.

torch allows it for convolutions and not for matrix products unless told otherwise, so that "float32" features, codes
and metrics of one model would be a mixture of both. Every command sets it once, for both.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_tf32(allowed: bool) -> None:
    """Allow or forbid it, for convolutions and matrix products on CUDA; the CPU is not touched."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def tf32_allowed() -> bool:
    """Whether either kind of product may use it."""
    return bool(torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Context of what is compared with others: validation, features, samples that are measured."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
