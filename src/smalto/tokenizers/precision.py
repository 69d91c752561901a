"""Encoding and decoding in bfloat16 where the machine has units for it, and what that does to codes."""

from typing import Any

import torch
from torch import Tensor

from smalto.errors import InputError

PRECISIONS = ("fp32", "bf16", "auto")


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are faster than in float32 there.

    CPUs without AVX-512 or AMX units emulate them: tens of times slower (measured on a Zen 3: 10 against 90 GFLOP/s).
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        units = ("avx512_bf16", "amx_tile")  # asked by private names, which older versions of torch lack
        return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in units)
    return False


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
