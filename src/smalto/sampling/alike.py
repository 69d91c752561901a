"""Functions that give every row of a batch the same bits, whatever rows lie beside it.

On a CPU torch computes most elements of a tensor by vectors and the last few one by one, and threads cut a tensor
where it suits them. ``silu``, ``gelu``, ``hypot`` and complex products round differently in the two ways, with AVX2
and with AVX-512, so that a row's result can depend on where it lies. Here it cannot, in one of two ways:

- Rows are given to torch so that all are cut alike: each is a run of elements of its own, which it is where the input
  does not lie densely, and a call has fewer elements than torch shares out among threads, or a single row.
- Functions are made of sums, products, quotients and square roots, which are exact to the last bit either way, and
  of ``exp`` and ``tanh``, for which torch has one way only.

The first costs nothing; every kernel counts when a step multiplies one or two rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GRAIN = 32_768
"""Elements from which on torch shares a tensor out among threads (``at::internal::GRAIN_SIZE``)."""

FEW = 8
"""Elements below which none are computed by vectors, which come in pairs of 4 at the least."""


def gated(both: Tensor) -> Tensor:
    """``silu(gate) * up`` of (rows, 2 C) that holds gate and up side by side."""
    gate, up = both.chunk(2, dim=-1)
    parts = [F.silu(part) for part in _blocks(gate)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).mul_(up)


def turned(x: Tensor, factors: Tensor) -> Tensor:
    """Pairs of channels (x0, x1), (x2, x3), ... of (B, T, H, D) as numbers, times complex factors (T, 1, D / 2).

    Returns:
        Float32; ``x`` itself if it is that already.
    """
    x = x.float()
    for part in _blocks(x, size=2):
        torch.view_as_complex(part.unflatten(-1, (-1, 2))).mul_(factors)
    return x


def norm(x: Tensor, floor: Tensor) -> Tensor:
    """``hypot(|x|, floor)`` of rows (rows, C), as (rows, 1)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.device.type != "cpu" or len(x) < FEW:
        return length.hypot_(floor)
    return length.expand(-1, 2).hypot(floor)[:, :1]  # not dense: one by one


def gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh."""
    if x.device.type != "cpu":
        return F.gelu(x, approximate="tanh")
    inner = (x * x).mul_(x).mul_(0.044715).add_(x).mul_((2 / torch.pi) ** 0.5)
    return inner.tanh_().add_(1).mul_(x).mul_(0.5)


def _blocks(x: Tensor, *, size: int = 1) -> tuple[Tensor, ...]:
    """Views of a batch that a thread computes alone, of at least one entry; ``size`` floats are an element."""
    if x.device.type != "cpu":
        return (x,)
    most = max(1, (GRAIN - 1) * size * len(x) // max(1, x.numel()))
    return x.split(most) if len(x) > most else (x,)
