"""From logits to codes: filters and draws as pure functions. Legend: B batch, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.types import SamplingConfig

MIN_TEMPERATURE = 1e-5
"""The authors' floor: colder than that no code but the most probable one is drawn, and float32 overflows."""
_MOST = torch.finfo(torch.float32).max


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
    crossed = ordered.float().softmax(-1).cumsum(-1) > p
    # The authors shift this by one entry; sums less their last term round to other sets in one row of a hundred.
    behind = F.pad(crossed[..., :-1], (1, 0))
    return logits.masked_fill(torch.empty_like(behind).scatter_(-1, index, behind), -torch.inf)


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse-transform sampling: int64 (B,) from logits (B, V) and uniforms (B,) in [0, 1).

    One uniform decides one code, so an image depends on its own seed only, not on its neighbours in the batch;
    no sort is needed. Always a code: infinite logits share what there is, and where some are NaN, which is for the
    caller to notice, so is the sum, and the last code is taken.
    """
    cumulative = logits.float().clamp(-_MOST, _MOST).softmax(-1).double().cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms.double().unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)


def next_codes(logits: Tensor, uniforms: Tensor, sampling: SamplingConfig) -> Tensor:
    """Temperature (at least 1e-5), then top-k, then top-p, then a draw; the most probable code at temperature 0."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    temperature = min(max(sampling.temperature, MIN_TEMPERATURE), _MOST)  # beyond, masked logits would become NaN
    logits = keep_top_k(logits / temperature, sampling.top_k)
    return draw(keep_top_p(logits, sampling.top_p), uniforms)
