"""How a codebook is used, and how much of the codes simple counting explains."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from smalto.errors import InputError


class CodebookUsage(Metric):
    """Counts of codes over everything seen since `reset`; exact, unlike a queue of the last codes.

    Args:
        codebook_size: number of codes, K.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, *, codebook_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if codebook_size < 1:
            raise InputError(f"codebook_size is {codebook_size}, must be >= 1")
        self.codebook_size = codebook_size
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Add integer codes of any shape.

        Raises:
            ValueError: a code outside the codebook.
        """
        codes = codes.detach().flatten().long()
        _check_codes(codes, self.codebook_size)
        self.counts.index_add_(0, codes, torch.ones_like(codes))  # bincount would wait for the device

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars ``usage`` (codes seen / codes), ``entropy`` in nats, ``perplexity`` = exp(entropy).

        All are 0 but perplexity 1 when nothing was seen.
        """
        entropy = unigram_entropy(self.counts)
        return {
            "usage": (self.counts > 0).double().mean(),
            "entropy": entropy,
            "perplexity": entropy.exp(),
        }


class QueueUsage(Metric):
    """Share of codes among the last ``queue_size`` codes seen, how the paper reports usage (section 3.1).

    65,536 codes are 256 images of 16 x 16 codes: a codebook of 16,384 that a whole set uses fully looks less used here.
    Over processes every one keeps its own last codes, an equal part of the queue each.

    Args:
        codebook_size: number of codes, K.
        queue_size: of the paper by default.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    queue: list[Tensor]

    def __init__(self, *, codebook_size: int, queue_size: int = 65_536, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if min(codebook_size, queue_size) < 1:
            raise InputError(f"codebook_size is {codebook_size} and queue_size {queue_size}; both must be >= 1")
        self.codebook_size = codebook_size
        self.queue_size = queue_size
        self.add_state("queue", default=[], dist_reduce_fx="cat")

    def update(self, codes: Tensor) -> None:
        """Add integer codes of any shape, oldest first."""
        codes = codes.detach().flatten().long()
        _check_codes(codes, self.codebook_size)
        self._keep(torch.cat([*self.queue, codes]), self.queue_size)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Bring an equal part of the queue; also a process that saw nothing takes part."""
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        self._keep(torch.cat([empty, *self.queue]), self.queue_size // processes)
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Float64 scalar in [0, 1]; 0 when nothing was seen."""
        queue = torch.cat(self.queue) if isinstance(self.queue, list) and self.queue else self.queue
        seen = queue.unique().numel() if isinstance(queue, Tensor) else 0
        return torch.tensor(seen / self.codebook_size, dtype=torch.float64)

    def _keep(self, codes: Tensor, size: int) -> None:
        self.queue = [codes[max(0, len(codes) - size) :].clone()]


def unigram_entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of the distribution given by counts (K,); float64 scalar, 0 for no counts.

    It is the loss of a generator that knows how often each code occurs and nothing else.
    """
    p = counts.double() / counts.sum().clamp_min(1)
    return -torch.special.xlogy(p, p).sum()


def position_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """How often each code occurs at each position: codes (N, L) to int64 (L, K)."""
    codes = codes.long()
    _check_codes(codes, codebook_size)
    length = codes.shape[1]
    flat = codes + torch.arange(length, device=codes.device) * codebook_size
    return flat.flatten().bincount(minlength=length * codebook_size).view(length, codebook_size)


def unigram_nll(counts: Tensor, codes: Tensor) -> tuple[float, float]:
    """What a generator has to beat: loss of codes under counts from the training set, with add-one smoothing.

    Args:
        counts: int64 (L, K) from `position_counts` on training codes (sums of several calls are fine).
        codes: int (N, L), held-out codes.

    Returns:
        Mean negative log likelihood per code in nats, by counts over all positions and by counts per
        position.

    Raises:
        ValueError: another length, or a code outside the codebook.
    """
    length, codebook_size = counts.shape
    codes = codes.long()
    if codes.dim() != 2 or codes.shape[1] != length or codes.shape[0] == 0:
        raise InputError(f"codes are {tuple(codes.shape)}, the counts are for (N, {length}) with N >= 1")
    _check_codes(codes, codebook_size)
    overall = counts.sum(dim=0).double() + 1
    by_position = counts.double() + 1
    overall_nll = -(overall / overall.sum()).log()[codes].mean()
    log_p = (by_position / by_position.sum(dim=1, keepdim=True)).log()
    position_nll = -log_p[torch.arange(length, device=codes.device), codes].mean()
    return float(overall_nll), float(position_nll)


def _check_codes(codes: Tensor, codebook_size: int) -> None:
    if codes.device.type == "cuda":  # looking would wait for the device, which refuses an index outside by itself
        return
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codebook_size:
        raise InputError(
            f"codes range from {int(codes.min())} to {int(codes.max())}, the codebook has {codebook_size}; "
            "set codebook_size to the tokenizer's"
        )
