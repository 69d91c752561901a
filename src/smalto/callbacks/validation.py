"""No validation is left out: not after a restart, and not at the end."""

from typing import Any

import lightning as L

from smalto.callbacks.checkpoint import is_last_step


class Validation(L.Callback):
    """Validates where the interval says and at the last step, in a run that was interrupted too.

    A checkpoint is saved before the validation of its step, which may take long and be interrupted. Lightning takes it
    for done when the run goes on from there; here it is made up for, so that its values exist whenever the kill came.
    """

    def __init__(self) -> None:
        self.step = -1
        """Step of the newest validation in this process."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Make up for the validation of the step that the run goes on from."""
        loop, epochs = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
        # Asked as Lightning asks at the end of that step, and told as it would have been: in its epoch.
        if not trainer.global_step or not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
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

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Note what was validated."""
        self.step = trainer.global_step
