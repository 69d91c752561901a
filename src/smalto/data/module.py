"""What all data modules share: global batch sizes, ranks, and loaders that resume."""

from abc import ABC, abstractmethod
from weakref import WeakSet

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor

from smalto.data.loader import ResumableLoader
from smalto.errors import InputError


class StatelessDataModule(LightningDataModule, ABC):
    """Data whose batches are functions of (seed, epoch, indices); subclasses say how many and how.

    ``setup`` of a subclass sets ``num_train`` and ``num_val``. Ranks come from the trainer when there is one.

    Args:
        batch_size: global training batch, divided by the number of processes.
        val_batch_size: global validation batch; None: as ``batch_size``.
        num_workers: processes that make batches; 0: none.
        seed: of order and augmentation.
    """

    num_train: int
    num_val: int

    def __init__(self, *, batch_size: int, val_batch_size: int | None, num_workers: int, seed: int) -> None:
        super().__init__()
        problems = []
        if batch_size < 1:
            problems.append(f"batch_size is {batch_size}, must be at least 1")
        if val_batch_size is not None and val_batch_size < 1:
            problems.append(f"val_batch_size is {val_batch_size}, must be at least 1, or null")
        if num_workers < 0:
            problems.append(f"num_workers is {num_workers}, must be at least 0")
        if problems:
            raise InputError("data: " + "; ".join(problems))
        self._loaders: WeakSet[ResumableLoader] = WeakSet()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size

    @abstractmethod
    def fetch_train(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Training samples ``indices`` as augmented in ``epoch``."""

    @abstractmethod
    def fetch_val(self, epoch: int, indices: np.ndarray) -> dict[str, Tensor]:
        """Validation samples ``indices``, the same in every epoch."""

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, without the last, smaller batch."""
        return self._loader(True)

    def val_dataloader(self) -> ResumableLoader | list:
        """Every sample once, in order; no loader when there are none."""
        return self._loader(False) if self.num_val else []

    def teardown(self, stage: str) -> None:
        """End the worker processes now; left to the garbage collector each would take seconds."""
        for loader in self._loaders:
            loader.close()

    def _loader(self, train: bool) -> ResumableLoader:
        trainer = self.trainer
        loader = ResumableLoader(
            fetch=self.fetch_train if train else self.fetch_val,
            num_samples=self.num_train if train else self.num_val,
            batch_size=self.batch_size if train else self.val_batch_size,
            seed=self.seed,
            shuffle=train,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            num_workers=self.num_workers,
        )
        self._loaders.add(loader)
        return loader
