"""Endless batches of images out of tar shards, and their count into epochs."""

import logging
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from smalto.data.annotations import class_number, class_numbers, read_labels
from smalto.data.pictures import check_file_size
from smalto.data.reader import stack_pixels
from smalto.data.tar_records import roles
from smalto.data.tar_stream import read_samples, shard_order, shuffled
from smalto.data.transforms import decode_image
from smalto.errors import InputError

log = logging.getLogger(__name__)

_MIX = 4  # keeps these random numbers apart from others


class ImageStream(IterableDataset):
    """Endless batches of one rank, or of one of its workers; arguments as in ``StreamedImages``."""

    def __init__(
        self,
        *,
        urls: list[str],
        image_size: int,
        batch_size: int,
        crop: Any,
        flip_prob: float,
        buffer_size: int,
        seed: int,
        max_skipped: float,
        rank: int,
        world_size: int,
        num_classes: int | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self._num_classes, self._numbers = num_classes, class_numbers(classes)
        self._urls, self._image_size, self._batch_size = urls, image_size, batch_size
        self._crop, self._flip_prob, self._buffer_size = crop, flip_prob, buffer_size
        self._seed, self._max_skipped = seed, max_skipped
        self._rank, self._world_size = rank, world_size
        self.start = (0, 0)  # epoch and batch
        self._read = self._skipped = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        consumer, consumers = self._rank * workers + number, self._world_size * workers
        rng = np.random.default_rng((_MIX, self._seed, *self.start, consumer, consumers))
        order = shard_order(self._seed, self.start, len(self._urls), consumer, consumers)
        images: list[Image.Image] = []
        labels: list[int] = []
        for data, label in shuffled(self._samples(order), self._buffer_size, rng):
            try:
                image = self._crop(decode_image(data), self._image_size, rng)
            except ValueError as error:
                self._skip(f"an image: {error}")
                continue
            self._read += 1
            mirrored = rng.random() < self._flip_prob
            images.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image)
            labels.append(label)
            if len(images) == self._batch_size:
                yield {"image": torch.from_numpy(stack_pixels(images)), "label": torch.tensor(labels)}
                images, labels = [], []

    def _samples(self, order: Iterator[int]) -> Iterator[tuple[bytes, int]]:
        """Encoded images with labels, -1 where there is none."""
        for number in order:
            url, found = self._urls[number], False
            samples = read_samples(url)
            while True:
                try:
                    sample = next(samples, None)
                except (OSError, HTTPException) as error:
                    self._skip(f"the rest of {url}: {error}")
                    break
                if sample is None:
                    if not found:
                        self._skip(f"{url}: it holds no images")
                    break
                parts = roles("a key", sample, url)
                if parts is None:
                    continue
                found = True
                try:
                    check_file_size(len(sample[parts.image]))
                    label = -1 if parts.label is None else self._label(sample[parts.label])
                except ValueError as error:
                    self._skip(f"an image of {url}: {error}")
                    continue
                yield sample[parts.image], label

    def _label(self, text: bytes) -> int:
        label = read_labels([text.decode("utf-8-sig")], lambda _: "a cls member")[0]
        number = class_number(label, self._numbers, "a cls member")
        if number is not None and self._num_classes is not None and number >= self._num_classes:
            raise InputError(f"the label is {number}, num_classes is {self._num_classes}")
        return -1 if number is None else number

    def _skip(self, what: str) -> None:
        self._skipped += 1
        log.warning("left out %s", what)
        # a few are forgiven, or one in the first thousand images would end the run
        if self._skipped > max(10, self._max_skipped * (self._read + self._skipped)):
            raise InputError(
                f"{self._skipped} images or shards of {self._read + self._skipped} could not be read, max_skipped is "
                f"{self._max_skipped}; the last is {what}. Repair them, leave them out of urls, or raise max_skipped"
            )


class StreamLoader:
    """Counts a stream off into epochs, for Lightning; the workers and their buffers live on from epoch to epoch."""

    batch_sampler = None  # Lightning looks here, then at ``sampler``

    def __init__(self, stream: ImageStream, steps_per_epoch: int, num_workers: int) -> None:
        self._stream, self._steps, self._num_workers = stream, steps_per_epoch, num_workers
        self._epoch = self._done = 0
        self._begin = 0  # batch of the epoch to go on at
        self._batches: Iterator[dict[str, Tensor]] | None = None

    @property
    def sampler(self) -> Self:
        """Itself: the object whose ``set_epoch`` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Number of the epoch that comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self._done, self._begin = self._begin, 0
        if self._batches is None:
            self._stream.start = (self._epoch, self._done)
            self._batches = iter(
                DataLoader(
                    self._stream,
                    batch_size=None,
                    num_workers=self._num_workers,
                    pin_memory=torch.cuda.is_available(),
                    generator=torch.Generator(),  # else it draws from the global one
                )
            )
        while self._done < self._steps:
            self._done += 1
            yield next(self._batches)

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches handed out in it."""
        return {"epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there, with a stream of its own."""
        self._epoch = state["epoch"]
        self._begin = self._done = state["batches"] % self._steps

    def close(self) -> None:
        """End the worker processes."""
        self._batches = None
