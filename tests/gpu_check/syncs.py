"""Where a training step waits for the GPU, as torch itself sees it."""

import json
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import torch

QUIET = 5
"""First steps that are not counted: optimizers and compilers allocate there."""


class Syncs(L.Callback):
    """Counts synchronising operations of training batches, by the line of smalto or Lightning that asked for them.

    Args:
        file: where the counts go at the end, as JSON: ``steps`` and ``places``.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.places: Counter[str] = Counter()
        self.steps = 0
        self._show: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= QUIET and pl_module.device.type == "cuda":
            self._show = warnings.showwarning
            warnings.showwarning = self._note
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def _note(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            places = [f for f in traceback.extract_stack() if "smalto" in f.filename or "lightning" in f.filename]
            frame = next((f for f in reversed(places) if f.filename != __file__), None)
            self.places["elsewhere" if frame is None else f"{Path(frame.filename).name}:{frame.lineno}"] += 1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        if self._show is not None:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning, self._show = self._show, None
            self.steps += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.file.write_text(json.dumps({"steps": self.steps, "places": dict(self.places)}))
