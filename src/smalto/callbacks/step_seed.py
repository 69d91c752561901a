"""Randomness as a function of the step, so that a resumed run draws what an unbroken one would have drawn."""

from typing import Any

import lightning as L
import numpy as np
import torch


class StepSeed(L.Callback):
    """Reseed torch before every training batch from (seed, epoch, batch, rank).

    Dropout, label drop and stochastic depth then need no saved generator state. Data order and augmentation follow
    the same rule in the data modules.

    Args:
        seed: of the run.
    """

    def __init__(self, *, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Seed all devices' generators."""
        parts = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1))
