"""No validation is left out: not after a restart, and not at the end."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L

from smalto.callbacks.checkpoint import is_last_step
from smalto.files import write_json
from smalto.nn.tf32 import without_tf32

NOTE = "validated.json"
"""File in the folder of a run: step and values of its newest validation."""


class Validation(L.Callback):
    """Validates where the interval says and at the last step, in a run that was interrupted too.

    A checkpoint is saved before the validation of its step, which may take long and be interrupted. Lightning takes it
    for done when the run goes on from there; here it is made up for, so that its values exist whenever the kill came.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.note = folder / NOTE
        self.step = -1
        """Step of the newest validation that is known."""
        self.metrics: dict[str, float] = {}
        """Its values, in the first process."""
        self._exact = ExitStack()

    def is_done(self, trainer: L.Trainer) -> bool:
        """Whether the current step was validated, by this process or before it was interrupted; all must ask."""
        if self.step != trainer.global_step:
            self.step, self.metrics = trainer.strategy.broadcast(self._noted() if trainer.is_global_zero else (-1, {}))
        return self.step == trainer.global_step

    def _noted(self) -> tuple[int, dict[str, float]]:
        try:
            note = json.loads(self.note.read_bytes())
            return int(note["step"]), dict(note["metrics"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return -1, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Make up for the validation of the step that the run goes on from."""
        loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
        # Asked as Lightning asks at the end of that step, and told as it would have been: in its epoch.
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if not trainer.global_step or not due or self.is_done(trainer):
            return
        epochs.completed -= trainer.is_last_batch
        trainer.validating = True
        loop.val_loop.restarting = False  # from its first batch
        loop.val_loop.run()
        trainer.training = True
        epochs.completed += trainer.is_last_batch

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Have Lightning validate and log the last step, whatever the intervals: the run is known by these values."""
        if is_last_step(trainer):
            trainer.should_stop = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """In float32 proper, as ``smalto evaluate``, whatever training allows."""
        self._exact.enter_context(without_tf32())

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Allow again what was allowed."""
        self._exact.close()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note what was validated; its row is with the loggers by now."""
        self._exact.close()
        self.step = trainer.global_step
        if trainer.is_global_zero:
            values = trainer.callback_metrics.items()
            self.metrics = {key: float(value) for key, value in values if key.startswith("val/")}
            write_json(self.note, {"step": self.step, "metrics": self.metrics})
