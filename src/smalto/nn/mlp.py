"""Gated feed-forward layer of Llama."""

import torch.nn.functional as F
from torch import Tensor, nn


def swiglu_hidden_size(dim: int, multiple_of: int = 256) -> int:
    """Two thirds of ``4 * dim``, rounded up to a multiple: three matrices then cost what two of 4x would."""
    hidden = int(2 * (4 * dim) / 3)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` without biases (arXiv:2002.05202), with dropout on the output."""

    def __init__(self, dim: int, hidden_size: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_size, bias=False)
        self.up = nn.Linear(dim, hidden_size, bias=False)
        self.down = nn.Linear(hidden_size, dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))
