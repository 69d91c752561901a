"""Frechet distance of two sets of features, in float64."""

import contextlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from smalto.errors import InputError
from smalto.metrics.finite import all_finite, check_finite
from smalto.metrics.metric_state import CarriesTensors

EPS = float(np.finfo(np.float64).eps)
MAX_ROOT_ERROR = 1e-10
"""Largest relative error of the matrix root that rounding may leave."""


@dataclass(frozen=True)
class Gaussian:
    """First two moments of a set of features.

    Args:
        mean: (D,) float64.
        cov: (D, D) float64, unbiased.
        n: number of images behind them; None for statistics that do not say it.
    """

    mean: Tensor
    cov: Tensor
    n: int | None

    @cached_property
    def root(self) -> np.ndarray:
        """R (D, r), float64, with ``R R^T`` = cov: Cholesky's at full rank, else pivoted and cut to the support.

        Directions in which n images cannot vary would contribute nothing but the root of their rounding error.
        """
        cov = self.cov.double().cpu().numpy()
        dim = len(cov)
        if self.n is None or self.n > dim:
            with contextlib.suppress(scipy.linalg.LinAlgError):
                return scipy.linalg.cholesky(cov, lower=True)
        factor, pivots, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
        rank = rank if self.n is None else min(rank, self.n - 1)
        root = np.zeros((dim, rank))
        root[pivots - 1] = np.tril(factor)[:, :rank]
        return root


class FrechetDistance(CarriesTensors, FrechetInceptionDistance):
    """FID (arXiv:1706.08500) on features computed elsewhere, so that one network pass serves every metric.

    States and updates are torchmetrics' own: float64 sums, added over processes. Two things are replaced.
    The matrix root: torchmetrics takes ``eigvals(S1 @ S2)``, which is off by 1e-5 relative on singular
    covariances (fewer images than features, the normal case in a quick check) and returns in the features'
    dtype. The real side: known statistics can be set without becoming states, because states are added over
    processes.

    Args:
        num_features: D.
    """

    carried = ("_given",)

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
            raise InputError("real statistics were set from a reference; drop it to measure real images instead")
        super().update(pool, real)

    def set_real(self, statistics: Gaussian) -> None:
        """Use known statistics for the real side, the same on every process.

        Raises:
            ValueError: statistics of another number of features, or that are not finite.
        """
        check_finite("the statistics of the real images", statistics.mean, statistics.cov)
        if statistics.mean.shape != (self.num_features,):
            raise InputError(
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
        """FID, float64 scalar; NaN where features were not finite.

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

    ``tr sqrt(Sa Sb)`` is the sum of the singular values of ``Ra^T Rb`` with ``S = R R^T``, which is the sum of the
    roots of the eigenvalues of ``Ra^T Sb Ra``. The eigenvalues cost half as much, but a root turns the rounding
    error of a small one into a large one: they are used while the bound on that error is negligible.

    Returns:
        Float64 scalar on ``b``'s device, never below zero; NaN where a side is not finite.

    Raises:
        ValueError: another number of features on each side.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"{a.mean.numel()} features against {b.mean.numel()}; both sides need the same extractor")
    if not (all_finite(a.mean, a.cov) and all_finite(b.mean, b.cov)):
        return b.mean.new_tensor(torch.nan, dtype=torch.float64)
    cov_a, cov_b = a.cov.double().cpu().numpy(), b.cov.double().cpu().numpy()
    full_rank = min(a.root.shape[1], b.root.shape[1]) == len(cov_a)
    # itype 2: the lower triangle of L^T B L, all that the eigenvalues need, in less than the arithmetic of one product
    cross = _sum_of_roots(scipy.linalg.lapack.dsygst(cov_b, a.root, itype=2, lower=1)[0]) if full_rank else None
    if cross is None:
        cross = float(scipy.linalg.svdvals(a.root.T @ b.root).sum()) if min(a.root.shape[1], b.root.shape[1]) else 0.0
    distance = (a.mean.to(b.mean) - b.mean).square().sum() + float(cov_a.trace() + cov_b.trace()) - 2 * cross
    # rounding can leave -1e-12 of the traces; an overflow is no distance
    return torch.where(distance.isfinite(), distance.clamp_min(0.0), torch.nan)


def _sum_of_roots(product: np.ndarray) -> float | None:
    """Sum of roots of the eigenvalues of a positive definite matrix (its lower triangle); None where rounding shows."""
    values = scipy.linalg.eigvalsh(product, lower=True, driver="evr").clip(min=0.0)
    error = len(values) ** 0.5 * EPS * values[-1]  # of each eigenvalue
    roots = np.sqrt(values)
    bound = np.minimum(np.sqrt(error), error / np.maximum(2 * roots, np.sqrt(error))).sum()
    return float(roots.sum()) if bound <= MAX_ROOT_ERROR * roots.sum() else None


def _moments(total: Tensor, second: Tensor, count: Tensor) -> Gaussian:
    n = int(count)
    if n < 2:
        raise InputError(f"a covariance needs at least 2 images, got {n}")
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
