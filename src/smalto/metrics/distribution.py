"""Frechet distance and Inception Score from precomputed features, in float64."""

from dataclasses import dataclass
from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance


@dataclass(frozen=True)
class Gaussian:
    """First two moments of a set of features.

    Args:
        mean: (D,) float64.
        cov: (D, D) float64, unbiased.
        n: number of images behind them.
    """

    mean: Tensor
    cov: Tensor
    n: int


class FrechetDistance(FrechetInceptionDistance):
    """FID (arXiv:1706.08500) on features computed elsewhere, so that one network pass serves every metric.

    States and updates are torchmetrics' own: float64 sums, added over processes. Two things are replaced.
    The matrix root: torchmetrics takes ``eigvals(S1 @ S2)``, which is off by 1e-5 relative on singular
    covariances (fewer images than features, the normal case in a quick check) and returns in the features'
    dtype. The real side: known statistics can be set without becoming states, because states are added over
    processes.

    Args:
        num_features: D.
    """

    def __init__(self, *, num_features: int, **kwargs: Any) -> None:
        super().__init__(feature=_AsGiven(num_features), reset_real_features=False, **kwargs)
        self.num_features = num_features
        self._given: Gaussian | None = None

    def update(self, pool: Tensor, real: bool) -> None:
        """Add features (B, D) of real or generated images.

        Raises:
            ValueError: real features after `set_real`.
        """
        if real and self._given is not None:
            raise ValueError("real statistics were set from a reference; drop it to measure real images instead")
        super().update(pool, real)

    def set_real(self, statistics: Gaussian) -> None:
        """Use known statistics for the real side, the same on every process.

        Raises:
            ValueError: statistics of another number of features.
        """
        if statistics.mean.shape != (self.num_features,):
            raise ValueError(
                f"reference statistics have {statistics.mean.numel()} features, the extractor gives "
                f"{self.num_features}; measure the reference again with this extractor"
            )
        self._given = statistics
        self._computed = None

    def real(self) -> Gaussian:
        """Statistics of the real side over all processes (a collective call unless it was set)."""
        if self._given is not None:
            return self._given
        with self.sync_context():
            return _moments(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)

    def compute(self) -> Tensor:
        """FID, float64 scalar.

        Raises:
            ValueError: fewer than two images on a side.
        """
        fake = _moments(self.fake_features_sum, self.fake_features_cov_sum, self.fake_features_num_samples)
        if self._given is not None:
            real = self._given
        else:
            real = _moments(self.real_features_sum, self.real_features_cov_sum, self.real_features_num_samples)
        return frechet_distance(real, fake)

    def reset_all(self) -> None:
        """Forget the real side too; `reset` keeps it."""
        self._given = None
        self.reset_real_features = True
        self.reset()
        self.reset_real_features = False


def frechet_distance(a: Gaussian, b: Gaussian) -> Tensor:
    """Squared Frechet distance of two Gaussians, exact for singular covariances as well.

    ``tr sqrt(Sa Sb)`` is the sum of roots of the eigenvalues of ``R^T Sb R`` with ``Sa = R R^T``. R is cut to
    the support of the covariance from fewer images (rank at most n - 1): directions without variance
    contribute nothing but the root of their rounding error, which at 1e-16 squared is no longer small.

    Returns:
        Float64 scalar on ``b``'s device, never below zero.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{a.mean.numel()} features against {b.mean.numel()}; both sides need the same extractor")
    mean_a, cov_a = a.mean.to(b.mean), a.cov.to(b.cov)
    small, n, other = (cov_a, a.n, b.cov) if a.n <= b.n else (b.cov, b.n, cov_a)
    # LAPACK's MRRR by scipy, on the CPU: torch's divide-and-conquer fails to converge on the many equal (zero)
    # eigenvalues of a few images, and is no faster here.
    values, vectors = (
        torch.from_numpy(part).to(small) for part in scipy.linalg.eigh(small.cpu().numpy(), driver="evr")
    )  # ascending
    keep = values > values[-1].clamp_min(0.0) * small.shape[0] * torch.finfo(small.dtype).eps
    keep[: max(0, small.shape[0] - (n - 1))] = False
    root = vectors[:, keep] * values[keep].sqrt()
    product = (root.T @ other @ root).cpu().numpy()
    cross = torch.from_numpy(scipy.linalg.eigvalsh(product, driver="evr")).to(small).clamp_min(0.0).sqrt().sum()
    distance = (mean_a - b.mean).square().sum() + cov_a.trace() + b.cov.trace() - 2 * cross
    return distance.clamp_min(0.0)  # rounding can leave -1e-12 of the traces


class InceptionScore(Metric):
    """Inception Score (arXiv:1606.03498) with ADM's rule: consecutive splits in the order of the samples.

    torchmetrics' own shuffles with the global generator, so its value changes from call to call and disturbs
    training. Here: ``max(1, N // split_size)`` consecutive splits of equal size (to one image), nothing
    shuffled or left out. At multiples of ``split_size``, such as the customary 50,000, this is ADM's
    evaluator to the last digit; ADM would give a remainder, however small, the weight of a full split. Over
    processes, samples count in the order of ranks. Samples sorted by class lower the score: draw labels at
    random.

    Args:
        num_logits: K.
        split_size: images per split.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    logits: list[Tensor]

    def __init__(self, *, num_logits: int, split_size: int = 5000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if split_size < 1:
            raise ValueError(f"split_size is {split_size}, must be >= 1 (images per split)")
        self.num_logits = num_logits
        self.split_size = split_size
        self.add_state("logits", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor) -> None:
        """Add logits (B, K) of generated images."""
        self.logits.append(logits.detach().float())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """A process without samples takes part with an empty block of the right width."""
        if not self.logits:
            self.logits.append(torch.zeros(0, self.num_logits, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation over splits, float64 (0 for a single split)."""
        logits = torch.cat(self.logits) if isinstance(self.logits, list) else self.logits
        splits = max(1, logits.shape[0] // self.split_size)
        scores = torch.stack([_inception_score(part) for part in logits.tensor_split(splits)])
        return scores.mean(), scores.std(correction=0)


def _inception_score(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(dim=1)
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0, keepdim=True).log())).nan_to_num(0.0).sum(dim=1).mean().exp()


def _moments(total: Tensor, second: Tensor, count: Tensor) -> Gaussian:
    n = int(count)
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images, got {n}")
    mean = total / n
    cov = (second - n * torch.outer(mean, mean)) / (n - 1)
    return Gaussian(mean=mean, cov=(cov + cov.T) / 2, n=n)


class _AsGiven(nn.Module):
    """Stands where torchmetrics expects the network; float64 keeps the result float64 too."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, pool: Tensor) -> Tensor:
        return pool.detach().double()
