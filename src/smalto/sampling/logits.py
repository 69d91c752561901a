"""From logits to codes: filters and draws as pure functions. Legend: B batch, V vocabulary."""

import torch
from torch import Tensor

from smalto.types import SamplingConfig


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Mask all but the k largest entries of each row; entries equal to the k-th are kept too.

    Args:
        logits: (B, V), any float dtype; not modified.
        k: 0, or anything not below V, keeps all.
    """
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    threshold = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Mask all but the smallest set of entries whose probability reaches ``p`` (nucleus sampling, arXiv:1904.09751).

    Args:
        logits: (B, V), any float dtype; not modified.
        p: in (0, 1]; 1 keeps all. The entry that crosses ``p`` is kept, so at least one per row is.
    """
    if p >= 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.float().softmax(-1)
    before = probability.cumsum(-1) - probability
    removed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before > p)
    return logits.masked_fill(removed, -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: int64 (B,) from logits (B, V) and uniforms (B,) in [0, 1).

    One uniform decides one code, so an image depends on its own seed only, not on its neighbours in the batch;
    no sort is needed.
    """
    cumulative = logits.float().softmax(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms.double().unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def next_codes(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Temperature, then top-k, then top-p, then a draw; the most probable code at temperature 0."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = keep_top_k(logits / sampling.temperature, sampling.top_k)
    return draw(keep_top_p(logits, sampling.top_p), uniforms)
