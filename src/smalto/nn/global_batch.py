"""Statistics of the batch of all processes together, so that training is the same on any number of them."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def mean_over_processes(local: Tensor) -> Tensor:
    """Mean of what each process has; gradients go back to all of them.

    With the gradients of parameters averaged, as DDP does, the result is that of one process with all batches, if each
    has as many images. All processes must call it, in forward and in backward passes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    return _Sum.apply(local) / dist.get_world_size()


class _Sum(torch.autograd.Function):
    """Over processes. Each result depends on each input, so gradients are added up the same way."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Sum.forward(ctx, grads[0])


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batches of all processes; torch's own runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), any float dtype; same shape and dtype out. Statistics are taken in float32 (float64 stays)."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = mean_over_processes(exact.mean((0, 2, 3)))
        centred = exact - mean[:, None, None]
        variance = mean_over_processes(centred.square().mean((0, 2, 3)))
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            count = x.numel() // x.shape[1] * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
