"""Images per second and time left."""

import time
from typing import Any

import lightning as L


class Throughput(L.Callback):
    """Logs ``train/images_per_second`` over a window of steps, validation and checkpoints not counted.

    Args:
        window: steps between two readings.
    """

    def __init__(self, *, window: int = 50) -> None:
        self.window = window
        self._images = 0
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop the clock; log once a window is full."""
        self._seconds += time.perf_counter() - self._start
        self._images += len(next(iter(batch.values()))) * trainer.world_size
        if (batch_idx + 1) % self.window == 0 and self._seconds > 0:
            pl_module.log("train/images_per_second", self._images / self._seconds)
            self._images, self._seconds = 0, 0.0
