"""The power laws that losses and distances follow as models grow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar, nnls
from scipy.stats import t as student_t

from smalto.errors import InputError

EXPONENTS = (0.01, 4.0)
"""Exponents that a fit may find; at the ends of this range data say nothing about a power law."""


@dataclass(frozen=True)
class PowerLaw:
    """``y = a * x^-b + c`` with its uncertainty.

    Args:
        a: factor.
        b: exponent, positive: y falls.
        c: what remains at infinite x, not negative.
        intervals: of ``a``, ``b`` and ``c``; nan where there are no more points than unknowns.
        confidence: of the intervals.
        x: the points.
        y: the points.
        covariance: (2, 2) or (3, 3) of ln a, ln b and, if it is not at its bound or given, c.
    """

    a: float
    b: float
    c: float
    intervals: dict[str, tuple[float, float]]
    confidence: float
    x: np.ndarray = field(repr=False, compare=False)
    y: np.ndarray = field(repr=False, compare=False)
    covariance: np.ndarray = field(repr=False, compare=False)

    def __call__(self, x: Any) -> np.ndarray:
        """Y at ``x``."""
        return _curve(np.asarray(x, float), self.a, self.b) + self.c

    @property
    def residual_std(self) -> float:
        """Of the points around the curve, with the degrees of freedom that are left; nan if there are none."""
        free = len(self.x) - len(self.covariance)
        return float(np.sqrt(np.sum((self.y - self(self.x)) ** 2) / free)) if free > 0 else math.nan

    def band(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the confidence interval of the curve (not of new points) at ``x``."""
        x = np.asarray(x, float)
        jacobian = _jacobian(x, self.a, self.b, len(self.covariance))
        spread = np.sqrt(np.einsum("ni,ij,nj->n", jacobian, self.covariance, jacobian))
        half = _quantile(self.confidence, len(self.x) - len(self.covariance)) * spread
        return self(x) - half, self(x) + half

    def __str__(self) -> str:
        low, high = self.intervals["b"]
        known = (
            f"{self.confidence:.0%} interval of the exponent {low:.3g} to {high:.3g}"
            if np.isfinite(low)
            else f"{len(self.x)} points leave no room for an interval"
        )
        return f"y = {self.a:.3g} x^-{self.b:.3g} + {self.c:.3g} ({known})"


def fit_power_law(
    x: Sequence[float] | np.ndarray,
    y: Sequence[float] | np.ndarray,
    *,
    offset: float | None = None,
    confidence: float = 0.95,
) -> PowerLaw:
    """Least squares of ``y = a * x^-b + c`` with a > 0, c >= 0; the same points give the same law.

    For each exponent the best a and c are a linear problem, so only the exponent is searched: no starting values, no
    local minima. Intervals come from the linearised covariance with Student's t, of a and b in logarithms.

    Args:
        x: sizes, positive; parameters, FLOPs, images.
        y: losses or distances.
        offset: c if it is known; None fits it.
        confidence: of the intervals, in (0, 1).

    Raises:
        ValueError: too few points, values that are not positive and finite, or points that no falling power law fits.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    unknowns = 3 if offset is None else 2
    if x.shape != y.shape or x.ndim != 1:
        raise InputError(f"x and y must be two lists of one length, they have shapes {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all()):
        raise InputError("a power law needs finite values and positive x")
    if len(np.unique(x)) < unknowns:
        raise InputError(f"{len(np.unique(x))} different sizes are too few for {unknowns} unknowns; add runs")
    if not 0 < confidence < 1:
        raise InputError(f"confidence is {confidence}, must be between 0 and 1, for instance 0.95")
    middle = float(np.exp(np.log(x).mean()))  # around it a and b are nearly independent

    def solve(log_b: float) -> tuple[np.ndarray, float]:
        falling = (x / middle) ** -math.exp(log_b)
        if offset is None:
            return nnls(np.stack([falling, np.ones_like(x)], axis=1), y)
        found, residual = nnls(falling[:, None], y - offset)
        return np.append(found, offset), residual

    grid = np.linspace(math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 400)
    best = int(np.argmin([solve(log_b)[1] for log_b in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    log_b = minimize_scalar(lambda value: solve(value)[1], bounds=ends, method="bounded", options={"xatol": 1e-12}).x
    (a, c), _ = solve(log_b)
    b = math.exp(log_b)
    if a <= 0:
        raise InputError("y does not fall with x")
    if best in (0, len(grid) - 1):
        raise InputError(f"no exponent between {EXPONENTS[0]:g} and {EXPONENTS[1]:g} fits; the points are no power law")
    free = 3 if offset is None and c > 0 else 2
    jacobian = _jacobian(x / middle, a, b, free)
    left = len(x) - free
    noise = np.sum((a * (x / middle) ** -b + c - y) ** 2) / left if left > 0 else math.nan
    # From a at the middle to a at x = 1: ln a gains b ln(middle).
    shift = np.eye(free)
    shift[0, 1] = b * math.log(middle)
    covariance = shift @ (noise * np.linalg.pinv(jacobian.T @ jacobian)) @ shift.T
    a = a * middle**b
    half = _quantile(confidence, left) * np.sqrt(np.diag(covariance))
    with np.errstate(over="ignore"):  # an interval without end is a fair answer
        factors = np.exp(half)
    intervals = {
        "a": (float(a / factors[0]), float(a * factors[0])),
        "b": (float(b / factors[1]), float(b * factors[1])),
        "c": (float(np.maximum(c - half[2], 0)), float(c + half[2])) if free == 3 else (float(c), float(c)),
    }
    return PowerLaw(float(a), b, float(c), intervals, confidence, x, y, covariance)


def law_of(x: Any, y: Any, *, offset: float | None = None) -> tuple[PowerLaw | None, str]:
    """A law and its words, or None and the reason: runs that show no power law are a result, not an error."""
    try:
        law = fit_power_law(x, y, offset=offset)
    except ValueError as reason:
        return None, f"no fit: {reason}"
    return law, str(law)


def _curve(x: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.exp(math.log(a) - b * np.log(x))  # x^-b alone would underflow for FLOPs


def _jacobian(x: np.ndarray, a: float, b: float, free: int) -> np.ndarray:
    """Derivatives by ln a, ln b and c, (points, free)."""
    falling = _curve(x, a, b)
    return np.stack([falling, -falling * b * np.log(x), np.ones_like(x)], axis=1)[:, :free]


def _quantile(confidence: float, degrees: int) -> float:
    return float(student_t.ppf((1 + confidence) / 2, degrees)) if degrees > 0 else math.nan
