"""One bar for the whole run: steps, rate, time left."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm.auto import tqdm

SHOWN = ("train/loss", "val/loss", "val/accuracy", "train/images_per_second", "train/mfu")
"""Metrics beside the bar, read when they are printed: ``prog_bar=True`` would wait for them every step."""


class StepProgress(ProgressBar):
    """Counts optimizer steps to the end of training, not batches to the end of an epoch.

    On a terminal a bar that moves; in a log file a line every ``line_every`` seconds.

    Args:
        line_every: seconds between two lines when stderr is not a terminal.
    """

    def __init__(self, *, line_every: float = 15.0) -> None:
        super().__init__()
        self.line_every = line_every
        self._bar: Any = None
        self._enabled = True
        self._printed = 0.0

    def disable(self) -> None:
        """Called on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """See :meth:`disable`."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the bar at the step a resumed run starts from."""
        if not self._enabled:
            return
        steps = trainer.max_steps
        if steps < 0:
            batches = float(trainer.num_training_batches) * (trainer.max_epochs or 1)
            steps = int(batches // trainer.accumulate_grad_batches)
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=steps,
            initial=trainer.global_step,
            desc="train",
            unit="step",
            dynamic_ncols=terminal,
            ncols=None if terminal else 150,
            mininterval=0.5 if terminal else self.line_every,
            bar_format=None
            if terminal
            else "{desc}: {n_fmt}/{total_fmt} steps, {elapsed} passed, {remaining} left, {rate_fmt}{postfix}\n",
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Move to the current step; numbers beside the bar at most twice a second."""
        if self._bar is None or trainer.global_step <= self._bar.n:
            return
        now = time.monotonic()
        if now - self._printed >= self._bar.mininterval:
            self._printed = now
            measured = trainer.callback_metrics
            values = {key: measured[key] for key in SHOWN if key in measured} | {**trainer.progress_bar_metrics}
            self._bar.set_postfix(
                {k.split("/", 1)[-1]: f"{float(v):.4g}" for k, v in values.items() if k != "v_num"}, refresh=False
            )
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the message stands on its own line."""
        if self._bar is not None:
            self._bar.close()
