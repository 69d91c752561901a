"""Inception Score from logits, in the order of the samples."""

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from smalto.errors import InputError

Remainder = Literal["equal", "adm"]


class InceptionScore(Metric):
    """Inception Score (arXiv:1606.03498) with ADM's rule: consecutive splits in the order of the samples.

    torchmetrics' own shuffles with the global generator, so its value changes from call to call and disturbs
    training. Samples sorted by class lower the score: a split then holds few classes.

    Args:
        num_logits: K.
        split_size: images per split.
        remainder: what becomes of N that is no multiple of ``split_size``. ``adm`` makes a last, smaller split with the
            weight of a full one, as ADM's evaluator does: one image too many, whose score is 1, can cost a tenth.
            ``equal`` divides N into ``max(1, N // split_size)`` splits of equal size (to one image). At multiples
            both are ADM's evaluator to the last digit.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    logits: list[Tensor]
    index: list[Tensor]

    def __init__(
        self, *, num_logits: int, split_size: int = 5000, remainder: Remainder = "equal", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if split_size < 1:
            raise InputError(f"split_size is {split_size}, must be >= 1 (images per split)")
        if remainder not in ("equal", "adm"):
            raise InputError(f"remainder of the Inception Score is {remainder!r}, must be equal or adm")
        self.num_logits = num_logits
        self.split_size = split_size
        self.remainder = remainder
        self.add_state("logits", default=[], dist_reduce_fx="cat")
        self.add_state("index", default=[], dist_reduce_fx="cat")
        self._seen = 0

    def update(self, logits: Tensor, index: Tensor | None = None) -> None:
        """Add logits (B, K) of generated images.

        Args:
            logits: any float dtype.
            index: int64 (B,), numbers of the images: their order, whichever process or batch they come from. None
                counts on from the images of this process; processes then follow one another.
        """
        if index is None:
            index = torch.arange(self._seen, self._seen + len(logits), device=logits.device)
        self._seen += len(logits)
        self.logits.append(logits.detach().float() if logits.dtype != torch.float64 else logits.detach())
        self.index.append(index.to(logits.device))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._seen = 0

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A process without samples takes part with an empty block of the right width."""
        if not self.logits:
            self.logits.append(torch.zeros(0, self.num_logits, device=self.device))
            self.index.append(torch.zeros(0, dtype=torch.int64, device=self.device))
        super().sync(*args, **kwargs)

    def in_order(self) -> Tensor:
        """Logits (N, K) of the images in the order of their numbers."""
        logits, index = (torch.cat(x) if isinstance(x, list) else x for x in (self.logits, self.index))
        return logits[index.argsort(stable=True)]

    def compute(self) -> dict[str, Tensor]:
        """Float64 ``mean`` and population ``std`` over splits, and what `class_runs` says of the order.

        NaN where a row of logits is.
        """
        logits = self.in_order()
        if self.remainder == "adm":
            parts = logits.split(self.split_size)
        else:
            parts = logits.tensor_split(max(1, logits.shape[0] // self.split_size))
        scores = torch.stack([_inception_score(part) for part in parts])
        runs, deviation = class_runs(logits.argmax(1))
        return {
            "mean": scores.mean(),
            "std": scores.std(correction=0),
            "class_runs": runs,
            "class_runs_deviation": deviation,
        }

    def splits(self, count: int) -> int:
        """Number of splits of ``count`` images."""
        return -(-count // self.split_size) if self.remainder == "adm" else max(1, count // self.split_size)


def class_runs(classes: Tensor) -> tuple[Tensor, Tensor]:
    """How much more often neighbours share a class (N,) than by chance, and the standard deviation of chance.

    About 0 when shuffled, up to 1 when sorted.
    """
    if len(classes) < 2:
        return torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    chance = (classes.bincount().double() / len(classes)).square().sum()
    runs = (classes[1:] == classes[:-1]).double().mean() - chance
    return runs, (chance * (1 - chance) / len(classes)).sqrt()


def _inception_score(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    terms = p * (log_p - p.mean(dim=0, keepdim=True).log())
    return torch.where(p == 0, 0.0, terms).sum(dim=1).mean().exp()  # NaN stays: a bad row is no class without samples
