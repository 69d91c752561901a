"""Images for training a tokenizer: shards to uint8 batches."""

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalto.data import fast_crops
from smalto.data.module import StatelessDataModule
from smalto.data.order import sample_rng, sample_uniform
from smalto.data.patterns import is_foreign, scan_foreign
from smalto.data.reader import ImageReader, stack_pixels
from smalto.data.shards import IMAGES, read_meta
from smalto.data.transforms import center_crop, random_crop
from smalto.errors import InputError

log = logging.getLogger(__name__)

_FLIP = 0  # stream number of the mirror choice


class ImageShards(StatelessDataModule):
    """Batches ``{"image": uint8 (B, 3, S, S), "label": int64 (B,)}`` from a folder of image shards.

    Augmentation is a function of (seed, epoch, image). Validation images are mirrored never, cropped in the
    centre (when training crops at all), in the order of the shards. Labels are -1 where the images have none.

    Small sets whose images all have one size are decoded once, in ``setup``, and kept.

    Args:
        path: folder that ``smalto prepare`` wrote; or other uncompressed WebDataset shards: a folder, or a pattern
            such as ``data/{train,val}-*.tar`` (those that begin with ``val`` or ``test`` validate).
        image_size: side of the images of a batch.
        batch_size: global.
        augment: ``none`` (images must have ``image_size``), ``center_crop`` (ADM), or ``random_crop``
            (short side to 1..1.25 times ``image_size``, random place, as in LlamaGen).
        flip_prob: of mirroring a training image left to right.
        num_workers: processes that decode; 0 decodes in the training process.
        seed: of order and augmentation.
        cache_mb: keep the decoded images in memory when they need no more than this; 0 never does.
        val_batch_size: global; None: as ``batch_size``.
        limit_val: use only the first so many validation images; None: all.
        resize: what crops of training are resized by: ``pillow``, as LlamaGen does, or ``torch``: a third of the
            time, one value in 200 differs by 1 or 2 of 255. Validation always uses Pillow.

    Attributes:
        num_train: training images.
        num_val: validation images.
        num_classes: None for images without labels.
        classes: names; may be empty.

    Raises:
        ValueError: arguments outside their range; images of another size with ``augment=none``; code shards.
        FileNotFoundError: nothing prepared at ``path``.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        image_size: int,
        batch_size: int,
        augment: Literal["none", "center_crop", "random_crop"],
        flip_prob: float,
        num_workers: int,
        seed: int,
        cache_mb: int = 256,
        val_batch_size: int | None = None,
        limit_val: int | None = None,
        resize: Literal["pillow", "torch"] = "pillow",
    ) -> None:
        super().__init__(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, seed=seed)
        problems = []
        if image_size < 1:
            problems.append(f"image_size is {image_size}, must be at least 1")
        if augment not in ("none", "center_crop", "random_crop"):
            problems.append(f"augment is {augment!r}, must be none, center_crop or random_crop")
        if not 0 <= flip_prob <= 1:
            problems.append(f"flip_prob is {flip_prob}, must be in [0, 1]")
        if cache_mb < 0:
            problems.append(f"cache_mb is {cache_mb}, must be at least 0")
        if limit_val is not None and limit_val < 1:
            problems.append(f"limit_val is {limit_val}, must be at least 1, or null for all")
        if resize not in ("pillow", "torch"):
            problems.append(f"resize is {resize!r}, must be pillow or torch")
        elif resize == "torch" and augment == "none":
            problems.append("resize is torch, but augment=none resizes nothing: leave it out")
        if problems:
            raise InputError("data: " + "; ".join(problems))
        self.path, self.image_size = Path(path), image_size
        self._augment, self._flip_prob, self._fast = augment, flip_prob, resize == "torch"
        self._cache_mb, self._limit_val = cache_mb, limit_val
        self._readers: dict[str, ImageReader] = {}
        self._cache: dict[str, np.ndarray] = {}

    def setup(self, stage: str | None = None) -> None:
        """Locate the images, and decode them if they fit ``cache_mb``; a second call does nothing."""
        if self._readers:
            return
        meta = scan_foreign(self.path) if is_foreign(self.path) else read_meta(self.path, IMAGES)
        stored = meta["image_size"]
        wanted = [self.image_size, self.image_size]
        if self._augment == "none" and stored != wanted:
            sizes = "images of different sizes" if stored is None else f"images of {stored[0]}x{stored[1]}"
            raise InputError(
                f"{self.path} holds {sizes}, image_size is {self.image_size}, and augment=none does "
                "not resize: set "
                f"data.augment=center_crop, or run smalto prepare with image_size={self.image_size} "
                "and a resize"
            )
        self.classes: list[str] = meta["classes"]
        self._readers = {split: ImageReader(self.path, meta, split) for split in ("train", "val")}
        self.num_classes: int | None = meta["num_classes"]
        if meta["encoding"] is None:  # foreign shards: the labels themselves are all that is known
            self.num_classes = 1 + max(int(r.labels.max(initial=-1)) for r in self._readers.values()) or None
        self.num_train = len(self._readers["train"])
        self.num_val = min(len(self._readers["val"]), self._limit_val or len(self._readers["val"]))
        counts = {"train": self.num_train, "val": self.num_val}
        if stored is not None and sum(counts.values()) * stored[0] * stored[1] * 3 <= self._cache_mb * 2**20:
            for split, count in counts.items():
                if count:
                    self._cache[split] = self._readers[split].pixels(np.arange(count))
            log.info("%s: %d images decoded into memory", self.path, sum(counts.values()))

    def fetch_train(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Training images, augmented."""
        if self._augment == "none":
            images = self._stored("train", indices)
        elif self._augment == "center_crop" and not self._fast:
            images = self._centered("train", indices)
        else:
            images = self._cropped(epoch, indices)
        mirrored = sample_uniform(self.seed, epoch, indices, _FLIP) < self._flip_prob
        images[mirrored] = images[mirrored, :, :, ::-1]
        return self._batch(images, self._readers["train"].labels[indices])

    def fetch_val(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Validation images, centre-cropped where training crops."""
        images = self._stored("val", indices) if self._augment == "none" else self._centered("val", indices)
        return self._batch(images, self._readers["val"].labels[indices])

    def _cropped(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        pictures = self._pictures("train", indices)
        if self._fast and self._augment == "center_crop":
            return torch.stack([fast_crops.center_crop(image, self.image_size) for image in pictures]).numpy()
        draws = [sample_rng(self.seed, epoch, int(index)) for index in indices]
        pairs = zip(pictures, draws, strict=True)
        if self._fast:
            return torch.stack([fast_crops.random_crop(image, self.image_size, rng) for image, rng in pairs]).numpy()
        return stack_pixels([random_crop(image, self.image_size, rng) for image, rng in pairs])

    def _stored(self, split: str, indices: np.ndarray) -> np.ndarray:
        """uint8 (B, 3, H, W), a fresh array."""
        if split in self._cache:
            return self._cache[split][indices]
        return self._readers[split].pixels(indices)

    def _pictures(self, split: str, indices: np.ndarray) -> list[Image.Image]:
        if split in self._cache:
            return [Image.fromarray(p) for p in self._cache[split][indices].transpose(0, 2, 3, 1)]
        return [self._readers[split].read(int(index)) for index in indices]

    def _centered(self, split: str, indices: np.ndarray) -> np.ndarray:
        return stack_pixels([center_crop(image, self.image_size) for image in self._pictures(split, indices)])

    @staticmethod
    def _batch(images: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(images), "label": torch.from_numpy(labels)}
