"""How probable held-out codes are to a generator that sees all codes before each: loss, accuracy, bits."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from smalto.metrics.scores import Scores


class CodeLikelihood(Metric):
    """Teacher-forced loss and accuracy over everything seen since `reset`; float64 sums, added over processes."""

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    nll: Tensor
    square: Tensor
    correct: Tensor
    images: Tensor
    codes: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, dtype in {"nll": torch.float64, "square": torch.float64, "correct": torch.int64}.items():
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        for name in ("images", "codes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, codes: Tensor) -> None:
        """Add logits (B, L, V), any float dtype, of codes int64 (B, L)."""
        nll = F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none").double().sum(dim=1)
        self.nll += nll.sum()
        self.square += nll.square().sum()
        self.correct += (logits.argmax(-1) == codes).sum()
        self.images += len(codes)
        self.codes += codes.numel()

    def compute(self) -> dict[str, Tensor]:
        """Float64 ``loss`` in nats per code, ``accuracy`` per code, ``bits_per_image``, and ``loss_error``.

        ``loss_error`` is the standard error of the loss over images, which are independent; codes of one are not. None
        is finite where logits were not.
        """
        length = self.codes.double() / self.images
        mean = self.nll / self.images
        variance = (self.square / self.images - mean.square()).clamp_min(0) / (self.images - 1)
        return {
            "loss": self.nll / self.codes,
            "accuracy": torch.where(self.nll.isfinite(), self.correct.double() / self.codes, torch.nan),
            "bits_per_image": mean / math.log(2),
            "loss_error": variance.sqrt() / length,
            "length": length,
        }

    def scores(self) -> Scores:
        """The same as `Scores`; all processes call it together."""
        found = {key: float(value) for key, value in self.compute().items()}
        scores = Scores()
        scores.add("loss", found["loss"], found["loss_error"])
        scores.add("accuracy", found["accuracy"])
        scores.add("bits_per_image", found["bits_per_image"], found["loss_error"] * found["length"] / math.log(2))
        return scores
