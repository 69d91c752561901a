"""Any number of images, a batch at a time: what ``smalto sample``, ``smalto evaluate`` and training callbacks share."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from smalto.errors import InputError
from smalto.sampling.requests import LabelKind, image_seeds, wanted_labels
from smalto.types import SamplesImages, SamplingConfig


@dataclass(frozen=True)
class ImageBatch:
    """Finished images.

    Args:
        indices: numbers of the images, B of them.
        labels: int64 (B,); None for images made elsewhere without.
        images: uint8 (B, 3, H, W).
    """

    indices: Sequence[int]
    labels: Tensor | None
    images: Tensor


def draw_images(
    task: SamplesImages,
    *,
    sampling: SamplingConfig,
    classes: Sequence[int],
    seed: int,
    indices: Sequence[int],
    batch_size: int,
    labels: LabelKind = "balanced",
) -> Iterator[ImageBatch]:
    """Draw the images of these numbers; one batch is in memory at a time.

    Image i depends on ``seed`` and i, not on the other numbers: give a killed job the missing ones, a process its
    share (``range(rank, count, world_size)``). Labels go round ``classes``, or are drawn from them at random. The
    task's weights must not change until the iterator is exhausted or closed.

    Raises:
        ValueError: a batch size below 1, an unknown kind of labels; what the task refuses.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, must be at least 1")
    with fixed_weights(task):
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            asked = wanted_labels(labels, chosen, classes, seed)
            images = task.sample_images(asked, sampling=sampling, seeds=image_seeds(seed, chosen))
            yield ImageBatch(chosen, asked, images)


def fixed_weights(task: SamplesImages) -> AbstractContextManager[None]:
    """Within it a task prepares its weights once for many calls, if it offers to; they must not change there."""
    return getattr(task, "fixed_weights", nullcontext)()
