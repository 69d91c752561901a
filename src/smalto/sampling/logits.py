"""From logits to codes: filters and draws as pure functions. Legend: B batch, V vocabulary."""

import numpy as np
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
    if _by_numpy(logits):
        threshold = _ascending(logits)[..., -k, None].to(logits.dtype)
    else:
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
    return _keep_top_p_by_values(logits, p) if _by_numpy(logits) else _keep_top_p_by_places(logits, p)


def _by_numpy(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and type(logits) is Tensor and not torch.compiler.is_compiling()


def _ascending(logits: Tensor) -> Tensor:
    """Rows sorted, float32 or float64: NumPy sorts values 25 times sooner than torch sorts them with their places."""
    wide = logits.detach() if logits.dtype in (torch.float32, torch.float64) else logits.detach().float()
    return torch.from_numpy(np.sort(wide.numpy(), axis=-1))


def _sums(ordered: Tensor) -> Tensor:
    """Of the probabilities of rows in descending order."""
    return ordered.float().softmax(-1).cumsum(-1)


def _keep_top_p_by_places(logits: Tensor, p: float) -> Tensor:
    """Which of several equal entries are kept at the end of the set is as the sort orders them."""
    ordered, index = logits.sort(dim=-1, descending=True)
    # The authors shift this by one entry; sums less their last term round to other sets in one row of a hundred.
    behind = F.pad((_sums(ordered) > p)[..., :-1], (1, 0))
    return logits.masked_fill(torch.empty_like(behind).scatter_(-1, index, behind), -torch.inf)


def _keep_top_p_by_values(logits: Tensor, p: float) -> Tensor:
    """The same set bit for bit; places are asked for only in rows whose set ends among equal entries."""
    ascending, most = _ascending(logits), logits.shape[-1]
    sums = _sums(ascending.flip(-1))
    below = torch.searchsorted(sums, sums.new_full((*sums.shape[:-1], 1), p), right=True)
    count = (below + 1).clamp_(max=most)  # with the entry that crosses
    last = ascending.gather(-1, most - count)
    all_kept = count == most  # also rows of NaN, whose sums exceed nothing
    kept = logits.where((logits >= last) | all_kept, -torch.inf)
    split = ((most - torch.searchsorted(ascending, last) > count) & ~all_kept).squeeze(-1)
    if bool(split.any()):
        kept[split] = _keep_top_p_by_places(logits[split], p)
    return kept


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
