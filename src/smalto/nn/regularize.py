"""Regularisation layers."""

import torch
from torch import Tensor, nn

from smalto.errors import InputError


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv:1603.09382): a residual branch is dropped whole, survivors are rescaled."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise InputError(f"drop_path is {drop_prob}, must be in [0, 1)")
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape; the identity in eval mode."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) < keep
        return x * mask.to(x.dtype) / keep
