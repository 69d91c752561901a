"""Root-mean-square normalisation (arXiv:1910.07467), as Llama uses it."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, then scale per channel.

    Statistics are taken in float32 (float64 stays) and the result is cast back before the scale, so that weights
    trained elsewhere in bfloat16 give the same numbers here.
    """

    def __init__(self, dim: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (..., dim), any float dtype; same shape out."""
        x_float = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_float * scale).to(x.dtype) * self.weight
