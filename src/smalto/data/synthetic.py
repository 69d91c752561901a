"""Made-up images and codes with something to learn, for tests and dry runs: no files, a known answer."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smalto.data.module import StatelessDataModule
from smalto.data.order import sample_rng, sample_uniform
from smalto.errors import InputError

_VAL_EPOCH = 1  # validation samples are drawn like those of training, from other random numbers


class SyntheticImages(StatelessDataModule):
    """Coloured gratings: the class decides direction and colour, the image phase and a little noise.

    Args:
        image_size: side.
        num_classes: number of gratings.
        num_train: training images.
        num_val: validation images.
        batch_size: global.
        seed: of the images and their order.
        num_workers: processes that draw.
        val_batch_size: global; None: as ``batch_size``.

    Attributes:
        classes: ``grating 0``, ...
    """

    def __init__(
        self,
        *,
        image_size: int,
        num_classes: int,
        num_train: int,
        num_val: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        val_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        if min(image_size, num_classes, num_train) < 1 or num_val < 0:
            raise InputError(
                f"image_size, num_classes, num_train, num_val are {image_size}, {num_classes}, {num_train}, "
                f"{num_val}; they must be positive (num_val may be 0)"
            )
        self.image_size, self.num_classes = image_size, num_classes
        self.num_train, self.num_val = num_train, num_val
        self.classes = [f"grating {number}" for number in range(num_classes)]

    def fetch_train(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """The same images in every epoch."""
        return self._draw(0, indices)

    def fetch_val(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Images of the same classes, others than in training."""
        return self._draw(_VAL_EPOCH, indices)

    def _draw(self, part: int, indices: np.ndarray) -> dict[str, Tensor]:
        labels = indices % self.num_classes
        row, column = np.mgrid[: self.image_size, : self.image_size] * (6 * np.pi / self.image_size)
        images = np.empty((len(indices), 3, self.image_size, self.image_size), np.uint8)
        for image, index, label in zip(images, indices, labels, strict=True):
            rng = sample_rng(self.seed, part, int(index))
            angle = np.pi * label / self.num_classes
            wave = np.sin(row * np.sin(angle) + column * np.cos(angle) + rng.uniform(0, 2 * np.pi))
            tint = 0.5 + 0.5 * np.cos(2 * np.pi * (label / self.num_classes + np.arange(3) / 3))
            clean = 127.5 + 100 * wave * tint[:, None, None]
            image[:] = np.clip(clean + rng.normal(0, 4, image.shape), 0, 255)
        return {"image": torch.from_numpy(images), "label": torch.from_numpy(labels.astype(np.int64))}


class SyntheticCodes(StatelessDataModule):
    """Code sequences that count upwards by a step the class decides, from a random first code, with some
    noise.

    A model that has learnt them has a loss of about ``noise * ln(codebook_size)`` per code and more at
    the first.

    Args:
        codebook_size: number of codes.
        code_shape: [[h, w]], one pair per scale; L is the sum of h * w.
        num_classes: class c steps by c + 1.
        num_train: training sequences.
        num_val: validation sequences.
        batch_size: global.
        seed: of the sequences and their order.
        noise: probability that a code is replaced by a random one.
        num_workers: processes that draw.
        val_batch_size: global; None: as ``batch_size``.

    Attributes:
        classes: ``step 1``, ...
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        code_shape: Sequence[Sequence[int]],
        num_classes: int,
        num_train: int,
        num_val: int,
        batch_size: int,
        seed: int,
        noise: float = 0.05,
        num_workers: int = 0,
        val_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        if min(codebook_size, num_classes, num_train) < 1 or num_val < 0 or not 0 <= noise <= 1:
            raise InputError(
                f"codebook_size, num_classes, num_train, num_val are {codebook_size}, {num_classes}, "
                f"{num_train}, "
                f"{num_val}, noise is {noise}; counts must be positive (num_val may be 0), noise in [0, 1]"
            )
        self.codebook_size, self.num_classes = codebook_size, num_classes
        self.num_train, self.num_val = num_train, num_val
        self.classes = [f"step {number + 1}" for number in range(num_classes)]
        self._num_tokens = sum(height * width for height, width in code_shape)
        self._noise = noise

    def fetch_train(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """The same sequences in every epoch."""
        return self._draw(0, indices)

    def fetch_val(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Sequences of the same classes, others than in training."""
        return self._draw(_VAL_EPOCH, indices)

    def _draw(self, part: int, indices: np.ndarray) -> dict[str, Tensor]:
        labels = (indices % self.num_classes).astype(np.int64)
        position = np.arange(self._num_tokens)
        first = sample_uniform(self.seed, part, indices, 0) * self.codebook_size
        codes = (first.astype(np.int64)[:, None] + position * (labels[:, None] + 1)) % self.codebook_size
        place = indices[:, None] * self._num_tokens + position
        noisy = sample_uniform(self.seed, part, place, 1) < self._noise
        other = (sample_uniform(self.seed, part, place, 2) * self.codebook_size).astype(np.int64)
        return {
            "codes": torch.from_numpy(np.where(noisy, other, codes)),
            "label": torch.from_numpy(labels),
        }
