"""Which images to write: their labels and seeds, as functions of an image's number alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def balanced_labels(indices: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Labels int64 (N,) that go round the classes: image i shows class ``classes[i % len(classes)]``."""
    return torch.tensor([classes[i % len(classes)] for i in indices], dtype=torch.int64)


def image_seeds(seed: int, indices: Sequence[int]) -> Tensor:
    """Seeds int64 (N,), one per image, from the run's seed and the image's number."""
    states = [np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 1 for i in indices]
    return torch.tensor([int(state) for state in states], dtype=torch.int64)
