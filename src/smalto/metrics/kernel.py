"""Kernel Inception Distance from features, by torch-fidelity's kernel and subsets."""

import math

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from smalto.errors import InputError
from smalto.metrics.finite import all_finite

SEED = 2020
"""torch-fidelity's: the same features give the same subsets, hence the same digits."""


def kernel_distance(
    real: Tensor, fake: Tensor, *, num_subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """KID (arXiv:1801.01401): unbiased squared MMD with the kernel ``(x y / D + 1)^3`` over random subsets.

    Only a subset at a time is taken to float64, so float32 features of any number cost no second copy. Unlike FID
    the expected value does not depend on the number of images. Subsets are drawn by position: images in another order
    (or from another number of processes) give another draw, within the deviation that is returned.

    Args:
        real: (N, D).
        fake: (M, D), any float dtype.
        num_subsets: pairs of subsets, drawn without replacement by a generator of its own.
        subset_size: images of a subset.

    Returns:
        Mean and population standard deviation over the subsets; NaN where a feature is not finite, drawn or not.

    Raises:
        ValueError: fewer images than a subset needs.
    """
    if min(len(real), len(fake)) < subset_size:
        raise InputError(
            f"KID with subsets of {subset_size} needs as many images a side, got {len(real)} real and {len(fake)} "
            "generated; set kid_subset_size lower"
        )
    if not all_finite(real, fake):
        return math.nan, math.nan
    rng = np.random.RandomState(SEED)
    distances = [_subset(fake, rng, subset_size, real) for _ in range(num_subsets)]
    return float(np.mean(distances)), float(np.std(distances))


def _subset(fake: Tensor, rng: np.random.RandomState, size: int, real: Tensor) -> float:
    # torch-fidelity's order: its first input is the generated side.
    drawn = [x[torch.from_numpy(rng.choice(len(x), size, replace=False)).to(x.device)] for x in (fake, real)]
    return float(kernel_mmd(*(x.double().cpu().numpy() for x in drawn)))
