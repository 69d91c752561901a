"""Checkpoints from which a run goes on exactly: only at the end of a step, whole or not at all."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from smalto.callbacks.agreement import Agreement
from smalto.errors import InputError, StorageError
from smalto.files import commit
from smalto.tasks.sharded_folder import damage
from smalto.tasks.step_log import is_last_step
from smalto.tasks.strategy import ShardedStrategy
from smalto.tasks.torch_file import DAMAGE, check_archive, is_archive

log = logging.getLogger(__name__)

UNFINISHED = ".unfinished"


class LatestCheckpoint(Checkpoint):
    """Saves every ``every_n_steps``, at the end, and when Ctrl-C or SIGTERM ends the run.

    Lightning's ModelCheckpoint saves wherever an exception happens to strike, in the middle of a step too (a
    generator that has stepped, a discriminator that has not), renames ``last`` after a resume, and has no save at
    the end of training. Here a signal is answered at the end of the running step, so what is saved is always a state
    that an unbroken run passes through. A file, or under ``strategy=fsdp`` a folder, is written under another name. It
    gets its own once all of it is on the disk and what the step logged is with the loggers: nothing that a checkpoint
    leaves behind is missing after a restart. Older ones are removed only after that.

    Args:
        dirpath: folder of the checkpoints; ``last.ckpt`` there points to the newest.
        every_n_steps: optimizer steps between two.
        keep: how many of the newest to keep; 0 keeps all.
    """

    def __init__(self, *, dirpath: str | Path, every_n_steps: int, keep: int = 1) -> None:
        if every_n_steps < 1 or keep < 0:
            raise InputError(
                f"callbacks.checkpoint: every_n_steps is {every_n_steps} (needs >= 1), keep is {keep} (needs >= 0)"
            )
        self.folder = Path(dirpath)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.metrics: dict[str, float] = {}
        """Newest values of what training logs at the last save; those from before a restart are among them."""
        self._step = self._saved_step = -1
        self._stopping = False
        self._agreement: Agreement | None = None
        self._pending: Path | None = None
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Answer signals from here on."""
        self._step = self._saved_step = trainer.global_step
        self._agreement = Agreement()
        if trainer.is_global_zero:
            with self._told(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"*{UNFINISHED}"):
                remove(leftover)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
            # Lightning asks all processes in every step, through the devices, for a signal that now comes here.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # a second signal: stop at once, without saving
        self._signal = number
        log.info("stopping after this step and saving; once more to stop at once")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Save if the interval is full, at the last step, or if a signal came; not within an accumulated one."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        # Ranks get signals at different steps; they must agree, or some would wait in a save that others never join.
        self._stopping = self._agreement is not None and self._agreement.any(self._signal is not None)
        if self._stopping or self._step % self.every_n_steps == 0 or is_last_step(trainer):
            self.save(trainer)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """The step before is over."""
        self._close_step(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The step before is over; its validation, if it is interrupted, is repeated after a restart."""
        self._close_step(trainer)

    def _close_step(self, trainer: L.Trainer) -> None:
        """Let the checkpoint of a step count once the step has logged everything; stop there if that was asked."""
        if self._pending is not None and (self._stopping or not _still_saving(trainer)):
            self._finish(trainer)
        if self._stopping:
            self._stopping = False
            raise SIGTERMException if self._signal == signal.SIGTERM else KeyboardInterrupt

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """A signal during validation does not wait for its end; the last saved step stands."""
        if self._signal is not None and trainer.world_size == 1 and self._previous:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save the end."""
        if self._agreement is not None:
            self._agreement.answer()  # nobody leaves while a question is on its way
        self.save(trainer)
        self._finish(trainer)
        self._close_step(trainer)
        self._restore_signals()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave signals as they were; the state in the middle of a step is not saved."""
        self._restore_signals()

    def _restore_signals(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def save(self, trainer: L.Trainer) -> None:
        """Write the current step unless it is written already, then remove what is too old.

        It counts as saved when the step is over; a strategy that writes while training goes on is not waited for.

        Raises:
            StorageError: it could not be written, or somebody removed the folder.
        """
        step = trainer.global_step
        if step == self._saved_step:
            return
        self._finish(trainer)
        if not trainer.strategy.broadcast(self.folder.is_dir()):  # writing would make it anew, and nothing else in it
            raise gone(self.folder)
        values = trainer.callback_metrics.items()
        self.metrics |= {key: float(value) for key, value in values if not key.startswith("val/")}
        path = self.folder / f"step_{step:08d}.ckpt"
        with self._told(path):
            trainer.save_checkpoint(path.with_suffix(UNFINISHED))
        self._saved_step, self._pending = step, path

    def _finish(self, trainer: L.Trainer) -> None:
        """Give the newest checkpoint its name, when it is on the disk."""
        path, self._pending = self._pending, None
        if path is None:
            return
        with self._told(path):
            if isinstance(trainer.strategy, ShardedStrategy):
                trainer.strategy.finish_saving()
                trainer.strategy.barrier()  # every process has written
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            with self._told(path):
                self._commit(path)

    def _commit(self, path: Path) -> None:
        unfinished = path.with_suffix(UNFINISHED)
        # On the disk before the older one goes: a power cut leaves one of the two whole.
        written = os.open(unfinished, os.O_RDONLY)
        try:
            os.fsync(written)
        finally:
            os.close(written)
        if path.is_dir() or unfinished.is_dir():
            remove(path)  # a damaged one; nothing is renamed onto a folder
        commit(unfinished, path)
        link = self.folder / f"last{UNFINISHED}"
        link.unlink(missing_ok=True)
        link.symlink_to(path.name)
        link.replace(self.folder / "last.ckpt")
        for old in step_checkpoints(self.folder)[: -self.keep] if self.keep else []:
            remove(old)

    def state_dict(self) -> dict[str, Any]:
        """The metrics: of a run of which only the end was missing, nothing else knows the last step's."""
        return {"metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.metrics = state_dict["metrics"]

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Say in one message that ``path`` could not be written and what stays good."""
        try:
            yield
        except OSError as error:
            if self._step > 0 and not self.folder.is_dir():
                raise gone(self.folder) from error
            remove(path.with_suffix(UNFINISHED))
            newest = newest_checkpoint(self.folder)
            raise StorageError(
                f"could not write {path}: {error.strerror or error}; "
                f"{f'{newest} stays good' if newest else 'nothing was saved yet'}: make room there and run the same "
                "command again to go on"
            ) from error


def gone(folder: Path) -> StorageError:
    """What to say of a folder that was there when the run began."""
    return StorageError(f"{folder} is gone: it was removed or moved away while the run was working there")


def _still_saving(trainer: L.Trainer) -> bool:
    return isinstance(trainer.strategy, ShardedStrategy) and trainer.strategy.still_saving()


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder; of a folder that is half gone nobody takes the rest for a checkpoint."""
    if path.is_dir() and not path.is_symlink():
        doomed = path.with_suffix(UNFINISHED)
        if doomed != path:
            rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
        rmtree(doomed, ignore_errors=True)  # another process may be at it
    else:
        path.unlink(missing_ok=True)


def step_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder by step, oldest first."""
    return sorted(folder.glob("step_*.ckpt"))


def newest_checkpoint(folder: Path, *, verify: bool = False) -> Path | None:
    """The newest whole checkpoint; damaged ones are passed over with a warning.

    Args:
        folder: of the checkpoints.
        verify: read the one that would be used to its end and compare checksums, for whoever is about to use it.
    """
    damaged: list[str] = []
    for path in reversed(step_checkpoints(folder)):
        problem = damage(path) if path.is_dir() else _damage_of_file(path, verify=verify)
        if problem is None:
            if damaged:
                log.warning("%s: %s is the newest whole one", "; ".join(damaged), path)
            return path
        damaged.append(f"{path} is damaged ({problem})")
    return None


def _damage_of_file(path: Path, *, verify: bool) -> str | None:
    if not is_archive(path):
        return "truncated"
    try:
        check_archive(path, path.stat().st_size, verify=verify)
    except (*DAMAGE, OSError) as error:
        return str(error)
    return None


def checkpoint_to_continue(folder: Path, *, verify: bool = True) -> Path | None:
    """Where a run goes on: its newest whole checkpoint; None if nothing was saved yet. See :func:`newest_checkpoint`.

    Raises:
        InputError: something was saved, and nothing of it can be used.
    """
    newest, saved = newest_checkpoint(folder, verify=verify), step_checkpoints(folder)
    if newest is None and saved:
        several = f"all {len(saved)} checkpoints in {folder} are"
        what = several if len(saved) > 1 else f"the only checkpoint {saved[0]} is"
        raise InputError(f"{what} damaged; put a whole copy there to go on, or begin anew at step 0 by overwrite=true")
    return newest


def discard_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a folder, for a run that starts anew."""
    for path in [*step_checkpoints(folder), *folder.glob(f"*{UNFINISHED}"), folder / "last.ckpt"]:
        remove(path)
