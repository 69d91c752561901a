"""What a GPU keeps that a CPU does not: a training step traced on a CPU's fake tensors then has a GPU's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.tokenizers.quantize import LOOKUP_ROWS


@contextmanager
def gpu_rules() -> Iterator[None]:
    """Within it, layers drop with a mask of a byte per element, and autocast normalises groups in float32.

    As CUDA does; on a CPU dropout keeps its mask in the dtype of the input, and autocast leaves groups in bfloat16:
    a tokenizer's step would seem to hold a third less. Latents are compared with the codebook in a GPU's chunks. The
    tensors stay on a CPU because PyTorch's backward pass asks the driver for the streams of a GPU, also when all
    tensors are fake.
    """
    with (
        mock.patch.multiple(F, dropout=_dropout, group_norm=_group_norm),
        mock.patch.dict(LOOKUP_ROWS, clear=True),
    ):
        yield


_cpu_group_norm = F.group_norm


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    wide = torch.is_autocast_enabled("cpu") and input.dtype != torch.float64
    return _cpu_group_norm(input.float() if wide else input, *args, **kwargs)
