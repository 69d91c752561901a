"""Any number of images, a batch at a time: what ``smalto sample``, ``smalto evaluate`` and training callbacks share."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from smalto.sampling.requests import balanced_labels, image_seeds
from smalto.types import SamplesImages, SamplingConfig


@dataclass(frozen=True)
class ImageBatch:
    """Finished images.

    Args:
        indices: numbers of the images, B of them.
        labels: int64 (B,).
        images: uint8 (B, 3, H, W).
    """

    indices: Sequence[int]
    labels: Tensor
    images: Tensor


def draw_images(
    task: SamplesImages,
    *,
    sampling: SamplingConfig,
    classes: Sequence[int],
    seed: int,
    indices: Sequence[int],
    batch_size: int,
) -> Iterator[ImageBatch]:
    """Draw the images of these numbers; one batch is in memory at a time.

    Image i depends on ``seed`` and i, not on the other numbers: give a killed job the missing ones, a process its
    share (``range(rank, count, world_size)``). Labels go round ``classes``. The task's weights must not change until
    the iterator is exhausted or closed.

    Raises:
        ValueError: a batch size below 1; what the task refuses, before the first image is drawn.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    # A task may offer to prepare its weights once for many calls; nothing else is known about it here.
    with getattr(task, "fixed_weights", nullcontext)():
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            labels = balanced_labels(chosen, classes)
            images = task.sample_images(labels, sampling=sampling, seeds=image_seeds(seed, chosen))
            yield ImageBatch(chosen, labels, images)
