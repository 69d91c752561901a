"""Images of sets too large to index: tar shards read in passing, from disks, servers or commands."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from PIL import Image

from smalto.data.image_stream import ImageStream, StreamLoader
from smalto.data.images import ImageShards
from smalto.data.loader import ResumableLoader
from smalto.data.tar_stream import expand_urls
from smalto.data.transforms import center_crop, random_crop
from smalto.errors import InputError


class StreamedImages(LightningDataModule):
    """Batches ``{"image": uint8 (B, 3, S, S), "label": int64 (B,)}`` from shards that are read one after the other.

    An epoch is ``steps_per_epoch`` batches, whatever the set holds: set it to about images / batch_size. Ranks and
    workers share the shards without overlap in each pass, but a pass does not end where an epoch does, so an epoch
    sees an image about once, not exactly once. For exactly once use ``ImageShards``.

    What is read is a function of (seed, place of the last start, ranks, workers): the same command gives the same
    batches. A run that goes on after a stop draws another stream from there on, rather than reading again all that it
    had read. All ranks get the same number of batches, whatever the number of shards.

    Unreadable images and shards are left out, counted and logged; too many of them end the run.

    Args:
        urls: shards: a path with braces and wildcards, ``http(s)://...{000..099}.tar``, ``pipe:COMMAND``, or a list.
        image_size: side of the images of a batch.
        batch_size: global.
        steps_per_epoch: batches in an epoch.
        augment: ``center_crop`` (ADM) or ``random_crop`` (as in LlamaGen).
        flip_prob: of mirroring an image left to right.
        buffer_size: encoded images in each worker from which the next is drawn.
        num_workers: processes that read and decode; 0: this one.
        seed: of order and augmentation.
        max_skipped: share of unreadable images and shards that is tolerated.
        num_classes: of the labels (members ``.cls``, numbers or words of ``classes``); None where there are none.
        classes: their names; may be empty.
        val_path: folder of image shards whose validation images are used, all of them; None: no validation.
        val_batch_size: global; None: as ``batch_size``.
        limit_val: use only the first so many validation images; None: all.

    Raises:
        ValueError: arguments outside their range, or too much that is unreadable.
        FileNotFoundError: a local path matches nothing.
    """

    def __init__(
        self,
        *,
        urls: str | Sequence[str],
        image_size: int,
        batch_size: int,
        steps_per_epoch: int,
        augment: Literal["center_crop", "random_crop"],
        flip_prob: float,
        buffer_size: int,
        num_workers: int,
        seed: int,
        max_skipped: float = 0.001,
        num_classes: int | None = None,
        classes: Sequence[str] = (),
        val_path: str | None = None,
        val_batch_size: int | None = None,
        limit_val: int | None = None,
    ) -> None:
        super().__init__()
        problems = []
        for name, value in (
            ("image_size", image_size),
            ("batch_size", batch_size),
            ("steps_per_epoch", steps_per_epoch),
            ("buffer_size", buffer_size),
        ):
            if value < 1:
                problems.append(f"{name} is {value}, must be at least 1")
        if augment not in ("center_crop", "random_crop"):
            problems.append(f"augment is {augment!r}, must be center_crop or random_crop")
        if not 0 <= flip_prob <= 1:
            problems.append(f"flip_prob is {flip_prob}, must be in [0, 1]")
        if not 0 <= max_skipped < 1:
            problems.append(f"max_skipped is {max_skipped}, must be in [0, 1)")
        if num_workers < 0:
            problems.append(f"num_workers is {num_workers}, must be at least 0")
        if problems:
            raise InputError("data: " + "; ".join(problems))
        self.urls, self.batch_size, self.steps_per_epoch = urls, batch_size, steps_per_epoch
        self.num_classes, self.classes = num_classes, list(classes)
        self.num_train, self.num_val = steps_per_epoch * batch_size, 0
        self._num_workers = num_workers
        self._stream_options: dict[str, Any] = {
            "image_size": image_size,
            "crop": random_crop if augment == "random_crop" else _center,
            "flip_prob": flip_prob,
            "buffer_size": buffer_size,
            "seed": seed,
            "max_skipped": max_skipped,
            "num_classes": num_classes,
            "classes": self.classes,
        }
        self._val: ImageShards | None = None
        if val_path is not None:
            self._val = ImageShards(
                path=val_path,
                image_size=image_size,
                batch_size=batch_size,
                augment="center_crop",
                flip_prob=0,
                num_workers=num_workers,
                seed=seed,
                val_batch_size=val_batch_size,
                limit_val=limit_val,
            )

    def setup(self, stage: str | None = None) -> None:
        """Find the shards; nothing is read yet."""
        self._urls = expand_urls(self.urls)
        if self._val is not None:
            self._val.trainer = self.trainer
            self._val.setup(stage)
            self.num_val = self._val.num_val

    def train_dataloader(self) -> StreamLoader:
        """Batches without end, counted off into epochs."""
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        if self.batch_size % world_size:
            raise InputError(
                f"batch_size is {self.batch_size} for {world_size} processes; the global batch must be a multiple of "
                "the number of processes"
            )
        stream = ImageStream(
            urls=self._urls,
            batch_size=self.batch_size // world_size,
            rank=rank,
            world_size=world_size,
            **self._stream_options,
        )
        self._loader = StreamLoader(stream, self.steps_per_epoch, self._num_workers)
        return self._loader

    def val_dataloader(self) -> ResumableLoader | list:
        """Every validation image once, in order."""
        return [] if self._val is None else self._val.val_dataloader()

    def teardown(self, stage: str) -> None:
        """End the worker processes."""
        if hasattr(self, "_loader"):
            self._loader.close()
        if self._val is not None:
            self._val.teardown(stage)


def _center(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    return center_crop(image, size)
