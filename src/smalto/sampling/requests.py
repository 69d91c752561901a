"""Which images to write: their labels and seeds, as functions of an image's number alone."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from smalto.errors import InputError

LabelKind = Literal["balanced", "random"]

_LABEL = 1  # stream number of the label, apart from the image's seed


def balanced_labels(indices: Sequence[int], classes: Sequence[int]) -> Tensor:
    """Labels int64 (N,) that go round the classes: image i shows class ``classes[i % len(classes)]``."""
    return torch.tensor([classes[i % len(classes)] for i in indices], dtype=torch.int64)


def random_labels(indices: Sequence[int], classes: Sequence[int], seed: int) -> Tensor:
    """Labels int64 (N,) drawn uniformly, as the authors do: by the run's seed and the image's number alone."""
    states = [np.random.SeedSequence([seed, i, _LABEL]).generate_state(1, np.uint64)[0] for i in indices]
    return torch.tensor([classes[int(state) % len(classes)] for state in states], dtype=torch.int64)


def wanted_labels(kind: LabelKind, indices: Sequence[int], classes: Sequence[int], seed: int) -> Tensor:
    """Labels int64 (N,) of images: ``balanced`` or ``random``.

    Raises:
        ValueError: another word.
    """
    if kind not in ("balanced", "random"):
        raise InputError(f"labels is {kind!r}, must be balanced (round the classes) or random")
    return balanced_labels(indices, classes) if kind == "balanced" else random_labels(indices, classes, seed)


def image_seeds(seed: int, indices: Sequence[int]) -> Tensor:
    """Seeds int64 (N,), one per image, from the run's seed and the image's number."""
    states = [np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0] >> 1 for i in indices]
    return torch.tensor([int(state) for state in states], dtype=torch.int64)
