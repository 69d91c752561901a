"""Checkpoints from which a run goes on exactly: only at the end of a step, whole or not at all."""

import logging
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any
from zipfile import is_zipfile

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from smalto.callbacks.agreement import Agreement
from smalto.data.write import commit

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"


class LatestCheckpoint(Checkpoint):
    """Saves every ``every_n_steps``, at the end, and when Ctrl-C or SIGTERM ends the run.

    Lightning's ModelCheckpoint saves wherever an exception happens to strike, in the middle of a step too (a
    generator that has stepped, a discriminator that has not), renames ``last`` after a resume, and has no save at
    the end of training. Here a signal is answered at the end of the running step, so what is saved is always a state
    that an unbroken run passes through. A file is written under another name and renamed; older ones are
    removed only after that.

    Args:
        dirpath: folder of the checkpoints; ``last.ckpt`` there points to the newest.
        every_n_steps: optimizer steps between two.
        keep: how many of the newest to keep; 0 keeps all.
    """

    def __init__(self, *, dirpath: str | Path, every_n_steps: int, keep: int = 1) -> None:
        if every_n_steps < 1 or keep < 0:
            raise ValueError(
                f"callbacks.checkpoint: every_n_steps is {every_n_steps} (needs >= 1), keep is {keep} (needs >= 0)"
            )
        self.folder = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._saved_step = -1
        self._agreement: Agreement | None = None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Answer signals from here on."""
        self._saved_step = trainer.global_step
        self._agreement = Agreement()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # a second signal: stop at once, without saving
        self._signal = number
        log.info("stopping after this step and saving; once more to stop at once")

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        # Ranks get signals at different steps; they must agree, or some would wait in a save that others never join.
        if self._agreement is not None and self._agreement.any(self._signal is not None):
            self.save(trainer)
            if self._signal == signal.SIGTERM:
                raise SIGTERMException
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Save if the interval is full; stop if a signal came."""
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
        self._stop_if_asked(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """A signal during validation does not wait for its end; the last saved step stands."""
        if self._signal is not None and trainer.world_size == 1 and self._previous:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end."""
        if self._agreement is not None:
            self._agreement.answer()  # nobody leaves while a question is on its way
        self.save(trainer)
        self._restore_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave signals as they were; the state in the middle of a step is not saved."""
        self._restore_signals()

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def save(self, trainer: L.Trainer) -> None:
        """Write the current step unless it is written already, then remove what is too old."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = self.folder / f"step_{step:08d}.ckpt"
        unfinished = path.with_suffix(UNFINISHED)
        try:
            trainer.save_checkpoint(unfinished)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            newest = newest_checkpoint(self.folder)
            raise OSError(
                f"could not write {path}: {error.strerror or error}; "
                f"{f'{newest} stays good' if newest else 'nothing was saved yet'}: make room there and run the same "
                "command again to go on"
            ) from error
        if trainer.is_global_zero:
            # On the disk before the older one goes: a power cut leaves one of the two whole.
            with unfinished.open("rb") as file:
                os.fsync(file.fileno())
            commit(unfinished, path)
            link = self.folder / f"last{UNFINISHED}"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self.folder / "last.ckpt")
            for old in step_checkpoints(self.folder)[: -self.keep] if self.keep else []:
                old.unlink()
        self._saved_step = step


def step_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first."""
    return sorted(folder.glob("step_*.ckpt"))


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; a truncated one is passed over with a warning."""
    for path in reversed(step_checkpoints(folder)):
        if is_zipfile(path) or path.is_dir():
            return path
        log.warning("%s is damaged (truncated), using the one before", path)
    return None


def discard_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder, for a run that starts anew."""
    for path in [*step_checkpoints(folder), *folder.glob(f"*{UNFINISHED}"), folder / "last.ckpt"]:
        if path.is_symlink() or path.exists():
            os.unlink(path)
