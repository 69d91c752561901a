"""Batches as a function of (seed, epoch, batch number, rank): nothing to save but how many were consumed."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalto.data.order import epoch_order
from smalto.errors import InputError

Fetch = Callable[[int, np.ndarray], dict[str, Tensor]]
"""(epoch, indices) to a batch; called in worker processes and in a thread too."""

AHEAD = 2
"""Batches that a thread has ready or is making, beyond the one in use."""


class ResumableLoader:
    """An iterable for Lightning that continues in mid-epoch exactly where training was.

    Lightning asks for ``__len__`` (of the full epoch, also after a resume), ``state_dict`` /
    ``load_state_dict``, and ``sampler.set_epoch``: the loader is its own sampler, without which every
    epoch would have the order of the first. The position is the number of batches handed out, whatever
    the workers, or the thread, prefetched.

    Training (``shuffle``) takes global batch b as ``order[b*G:(b+1)*G]``, drops the rest of the epoch,
    and gives each rank its slice: the same images are in the same global batch whatever the number of ranks.
    Otherwise all samples come exactly once, in order, without padding; each rank gets the same number of
    batches (collectives would hang otherwise), of sizes that differ by at most one between ranks.

    Args:
        fetch: makes a batch.
        num_samples: in the data set.
        batch_size: global, summed over ranks.
        seed: of the order.
        shuffle: training order and drop of the last, smaller batch.
        rank: of this process.
        world_size: number of processes.
        num_workers: processes that fetch; 0 fetches here, in a thread if there is a GPU to keep busy meanwhile.

    Raises:
        ValueError: a batch size that ``world_size`` does not divide, or fewer samples than a batch (or a
            rank) needs.
    """

    batch_sampler = None  # Lightning looks whether a validation loader shuffles: here, then at ``sampler``

    def __init__(
        self,
        *,
        fetch: Fetch,
        num_samples: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int,
        world_size: int,
        num_workers: int,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise InputError(
                f"batch_size is {batch_size} for {world_size} processes; the global batch must be a positive "
                "multiple of the number of processes"
            )
        needed = batch_size if shuffle else world_size
        if num_samples < needed and shuffle:
            raise InputError(
                f"{num_samples} samples are too few: one training batch needs {needed}; lower batch_size or prepare "
                "more data"
            )
        if num_samples < needed:
            raise InputError(
                f"{num_samples} samples are too few: validation on {world_size} processes needs {needed}, one each; "
                "prepare more (val_fraction), or use fewer devices"
            )
        self._num_samples, self._batch_size = num_samples, batch_size
        self._seed, self._shuffle = seed, shuffle
        self._rank, self._world_size = rank, world_size
        self._epoch = self._start = self._done = 0
        self._plan = _Plan()
        self._dataset = _Fetched(fetch)
        self._num_workers = num_workers
        self._workers: DataLoader | None = None  # made when first needed, then kept from epoch to epoch

    @property
    def sampler(self) -> Self:
        """Itself: the object whose ``set_epoch`` Lightning calls."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Order of ``epoch`` from the next ``iter`` on."""
        self._epoch = epoch

    def __len__(self) -> int:
        if self._shuffle:
            return self._num_samples // self._batch_size
        return math.ceil(self._num_samples / self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        # a generator: its body begins at the first next(), after Lightning has called set_epoch
        epoch, start = self._epoch, self._start
        self._done, self._start = start, 0
        self._plan.items = [(epoch, indices) for indices in self.batches(epoch)[start:]]
        if self._num_workers and self._workers is None:
            self._workers = self._start_workers()
        source: Iterable[dict[str, Tensor]]
        if self._workers is not None:
            source = self._workers
        elif torch.cuda.is_available():
            source = fetched_ahead(self._dataset.__getitem__, self._plan.items)
        else:
            source = map(self._dataset.__getitem__, self._plan.items)
        for batch in source:
            self._done += 1
            yield batch

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Sample numbers of each batch of this rank in ``epoch``."""
        if not self._shuffle:
            return [_share(part, self._rank, self._world_size) for part in self._ordered_parts()]
        order = epoch_order(self._seed, epoch, self._num_samples)
        full = order[: len(self) * self._batch_size].reshape(len(self), self._world_size, -1)
        return list(full[:, self._rank])

    def _ordered_parts(self) -> list[np.ndarray]:
        parts = np.split(np.arange(self._num_samples), range(self._batch_size, self._num_samples, self._batch_size))
        if len(parts[-1]) < self._world_size:  # too few for every rank: the last two share
            parts[-2:] = np.array_split(np.concatenate(parts[-2:]), 2)
        return parts

    def close(self) -> None:
        """End the worker processes; a later ``iter`` starts new ones."""
        self._workers = None

    def _start_workers(self) -> DataLoader:
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=self._plan,
            num_workers=self._num_workers,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch draws from the global one
        )

    def state_dict(self) -> dict[str, Any]:
        """Position: epoch, and batches handed out in it."""
        return {"epoch": self._epoch, "batches": self._done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after that position; a completed epoch is followed by a whole one."""
        self._epoch = state["epoch"]
        self._start = self._done = state["batches"] % len(self)


def fetched_ahead(
    fetch: Callable[[tuple[int, np.ndarray]], dict[str, Tensor]], items: list[tuple[int, np.ndarray]]
) -> Iterator[dict[str, Tensor]]:
    """The batches of ``items`` in their order, made in a thread, in memory from which a GPU copies by itself."""

    def pinned(item: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        return {name: value.pin_memory() for name, value in fetch(item).items()}

    # Of this process: a new thread would begin with the first GPU, and take memory there.
    device = torch.cuda.current_device()
    pool = ThreadPoolExecutor(1, "batches", torch.cuda.set_device, (device,))
    waiting: deque[Future[dict[str, Tensor]]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(pinned, item))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _share(indices: np.ndarray, rank: int, world_size: int) -> np.ndarray:
    return np.array_split(indices, world_size)[rank]


class _Fetched(Dataset):
    """Item (epoch, indices) is a whole batch."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch

    def __getitem__(self, item: tuple[int, np.ndarray]) -> dict[str, Tensor]:
        return self._fetch(*item)


class _Plan:
    """The batches wanted next; read anew by the long-lived workers at each epoch.

    Knows nothing of the loader: in a reference cycle the workers would be collected in an order that makes each
    wait five seconds for its end.
    """

    def __init__(self) -> None:
        self.items: list[tuple[int, np.ndarray]] = []

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)
