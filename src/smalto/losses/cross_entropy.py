"""Cross-entropy of a linear layer's logits without the logits of the whole batch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: int) -> Tensor:
    """Mean of ``cross_entropy(hidden @ weight.T, targets)``, forward and backward ``rows`` rows at a time.

    Gradients are made together with the loss, while the logits of the rows are there, so nothing is computed twice.
    For 4096 codes of a vocabulary of 16384, 512 rows hold 34 MB of logits where the plain loss holds three
    tensors of 268 MB (logits, log-probabilities, their gradient).

    Args:
        hidden: (N, C), any float dtype; under autocast the products run in its dtype.
        weight: (V, C) of a linear layer without bias.
        targets: int64 (N,).
        rows: at least 1. In float16 ``rows`` times the largest value of ``hidden`` must stay below 65504, which holds
            the sums over rows; 512 rows and normed values leave a factor of 5.

    Returns:
        Scalar, float32 (float64 stays). It can be differentiated once.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    return _LinearCrossEntropy.apply(hidden, weight, targets, rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            exact = torch.promote_types(hidden.dtype, torch.float32)
            # 1 / (N V) is below what float16 holds, and the loss scale that would lift it comes in the backward pass.
            ctx.divide_later = hidden.dtype == torch.float16
            ctx.rows = len(hidden)
            matrix = weight.to(hidden.dtype)
            want_hidden, want_weight = ctx.needs_input_grad[:2]
            grad_hidden = torch.empty_like(hidden) if want_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=exact) if want_weight else None
            total = hidden.new_zeros((), dtype=exact)
            for start in range(0, len(hidden), rows):
                part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
                logits = F.linear(part, matrix).to(exact)
                log_sum = logits.logsumexp(1, keepdim=True)
                total += (log_sum - logits.gather(1, wanted)).sum()
                if not (want_hidden or want_weight):
                    continue
                grad = logits.sub_(log_sum).exp_()
                grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
                if not ctx.divide_later:
                    grad.div_(len(hidden))
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, matrix, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    grad_weight += grad.T @ part
            ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
            return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.rows if ctx.divide_later else grads[0]
        if ctx.divide_later and grad_hidden is not None:  # a loss scale of 2^16 is infinite in float16
            grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        elif grad_hidden is not None:
            grad_hidden = grad_hidden * factor
        return grad_hidden, None if grad_weight is None else grad_weight * factor, None, None
