"""Does a generated image show the class that was asked for? Nearest class mean, fitted on real features."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from smalto.errors import InputError
from smalto.metrics.metric_state import CarriesTensors

MIN_STD = 1e-3
"""Features are ReLU averages of order 0.1 to 1; a feature that never fires must not be divided by zero."""


@dataclass(frozen=True)
class ClassMeans:
    """A fitted probe.

    Args:
        mean: (C, D) float32, class means of the features; rows of classes never seen are 0.
        std: (D,) float32, standard deviation of each feature within classes.
        count: (C,) int64, real images per class.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def predict(self, pool: Tensor) -> Tensor:
        """Nearest seen class (B,) int64 of features (B, D), in units of each feature's standard deviation."""
        std = self.std.to(pool.device).clamp_min(MIN_STD)
        distance = torch.cdist(pool.float() / std, self.mean.to(pool.device) / std)
        return distance.masked_fill(self.count.to(pool.device) == 0, torch.inf).argmin(dim=1)


class ClassMoments(Metric):
    """Streaming fit of `ClassMeans`: float64 sums, added over processes.

    Args:
        num_classes: C.
        num_features: D.
    """

    full_state_update = False
    is_differentiable = False
    count: Tensor
    total: Tensor
    square: Tensor

    def __init__(self, *, num_classes: int, num_features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise InputError(f"num_classes is {num_classes}, must be >= 1")
        self.num_classes = num_classes
        self.add_state("count", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(num_classes, num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("square", torch.zeros(num_features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pool: Tensor, label: Tensor) -> None:
        """Add features (B, D) of real images with labels (B,)."""
        check_labels(label, self.num_classes)  # where they are: on the CPU it costs nothing
        label, pool = label.to(pool.device), pool.detach().double()
        self.count.index_add_(0, label, torch.ones_like(label))  # bincount would wait for the device
        self.total.index_add_(0, label, pool)
        self.square += pool.square().sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """The fields of `ClassMeans` (torchmetrics walks through results and refuses frozen dataclasses)."""
        n = self.count.sum().clamp_min(1)
        mean = self.total / self.count.clamp_min(1).unsqueeze(1)
        within = self.square - (self.count.unsqueeze(1) * mean.square()).sum(dim=0)
        std = (within.clamp_min(0.0) / n).sqrt()
        return {"mean": mean.float(), "std": std.float(), "count": self.count}


class ClassProbe(CarriesTensors):
    """Share of generated images whose nearest class mean is the class asked for.

    Args:
        means: fitted on real images, by the same extractor.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    correct: Tensor
    asked: Tensor
    broken: Tensor

    carried = ("means",)

    def __init__(self, *, means: ClassMeans, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.means = means
        classes = means.count.numel()
        self.add_state("correct", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("asked", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("broken", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pool: Tensor, label: Tensor) -> None:
        """Add features (B, D) of generated images with the labels (B,) that were asked for."""
        check_labels(label, self.asked.numel())
        label = label.to(pool.device)
        hit = self.means.predict(pool) == label
        self.broken += (~pool.isfinite().all(dim=1)).sum()
        self.asked.index_add_(0, label, torch.ones_like(label))
        self.correct.index_add_(0, label, hit.long())

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` over all images (float64 scalar) and ``per_class`` (C,), NaN where not asked.

        All NaN where a feature, of any image or of the class means, is not finite.
        """
        broken = (self.broken > 0) | ~(self.means.mean.isfinite().all() & self.means.std.isfinite().all())
        correct = torch.where(broken.to(self.correct.device), torch.nan, self.correct.double())
        return {"accuracy": correct.sum() / self.asked.sum(), "per_class": correct / self.asked}


def check_labels(label: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class index.

    Raises:
        ValueError: a label outside [0, num_classes).
    """
    if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < num_classes:
        raise InputError(
            f"labels range from {int(label.min())} to {int(label.max())}, the class probe knows 0 to "
            f"{num_classes - 1}; set num_classes to the data's"
        )
