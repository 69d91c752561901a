"""Encoding and decoding in bfloat16 where the machine has units for it, and what that does to codes."""

from typing import Any

import torch
from torch import Tensor

from smalto.errors import InputError
from smalto.nn.hardware import has_fast_bf16

PRECISIONS = ("fp32", "bf16", "auto")


def use_bf16(precision: str, device: torch.device | str) -> bool:
    """What ``precision`` means on ``device``: ``auto`` is ``bf16`` where that is faster, else ``fp32``.

    Raises:
        ValueError: another word.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}, must be one of {', '.join(PRECISIONS)}")
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def in_precision(precision: str, device: torch.device) -> torch.autocast:
    """Context in which convolutions and products on ``device`` compute in ``precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(precision, device))


@torch.inference_mode()
def encode(tokenizer: Any, image: Tensor, *, precision: str = "fp32") -> Tensor:
    """``tokenizer.encode``, convolutions in ``precision``; distances to the codebook are float32 all the same.

    Args:
        tokenizer: a module in eval mode.
        image: float (B, 3, H, W) in [-1, 1].
        precision: ``fp32``, ``bf16`` (a few per cent of the codes change), or ``auto``.

    Returns:
        Int64 (B, L).
    """
    with in_precision(precision, image.device):
        return tokenizer.encode(image)


@torch.inference_mode()
def decode(tokenizer: Any, codes: Tensor, *, precision: str = "fp32") -> Tensor:
    """``tokenizer.decode``, convolutions in ``precision``.

    Args:
        tokenizer: a module in eval mode.
        codes: int64 (B, L).
        precision: ``fp32``, ``bf16`` (pixels differ by about 0.01 of [-1, 1] on average), or ``auto``.

    Returns:
        Float32 (B, 3, H, W), about [-1, 1].
    """
    with in_precision(precision, codes.device):
        return tokenizer.decode(codes).float()


def code_agreement(tokenizer: Any, image: Tensor, *, precision: str = "bf16") -> float:
    """Share of codes of ``image`` that ``precision`` leaves as float32 has them."""
    return (encode(tokenizer, image) == encode(tokenizer, image, precision=precision)).float().mean().item()
