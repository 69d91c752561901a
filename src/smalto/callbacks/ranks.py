"""One process of a run has died: the others end too, and say which one and why.

Lightning starts processes for the other devices of a machine and kills everything without a word when one of them
fails; nobody ends them when the first process dies. Under torchrun and SLURM that is their business, and nothing here
acts.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch

from smalto.errors import InputError

POLL = 0.5
"""Seconds between two looks at the other processes."""
GRACE = 20.0
"""Seconds from a death in which the first process may end by itself, by a failed collective or a signal."""
PATIENCE = 5.0
"""Seconds in which the cause of a failed collective may show."""
TAIL = 15
"""Lines of a dead process that are shown."""

BEGIN = "--- "
"""First line of a process in its log, which it goes on with."""

PARENT = "SMALTO_PARENT"


def log_of_rank(folder: Path, local_rank: int, node_rank: int = 0) -> Path:
    """Where a process that Lightning started writes everything; the first one's output stays on the terminal."""
    return folder / (f"node_{node_rank}_rank_{local_rank}.log" if node_rank else f"rank_{local_rank}.log")


def follow_parent(folder: Path) -> None:
    """In a process that Lightning started: write to a log of its own, end when the first process is gone.

    In the first process: leave word for those that it will start.
    """
    if os.environ.get(PARENT) != str(os.getppid()) or os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[PARENT] = str(os.getpid())
        return
    path = log_of_rank(folder, int(os.environ["LOCAL_RANK"]), int(os.environ.get("NODE_RANK", "0")))
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    # The descriptors, not sys.stderr: what native code says before it dies belongs there as well.
    with path.open("a") as file:
        file.write(f"{BEGIN}{datetime.now():%Y-%m-%d %H:%M:%S}, process {os.getpid()}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="parent-watch").start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(POLL)
    sys.stderr.write("the first process is gone, ending\n")
    sys.stderr.flush()
    os._exit(1)


class RankWatch:
    """A context for ``trainer.fit``: watches the processes that Lightning starts beside the first of a machine.

    When one dies, collectives of the others fail or wait for ever. If one fails here, the error that leaves the context
    says whose death it was; if it waits, the run is ended from here.

    Args:
        trainer: whose processes they are.
        folder: of the run, with the logs of the processes.

    Raises:
        ValueError: another process has died.
    """

    def __init__(self, trainer: L.Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.folder = folder
        self._over = threading.Event()

    def __enter__(self) -> "RankWatch":
        threading.Thread(target=self._watch, daemon=True, name="rank-watch").start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
            return
        until = time.monotonic() + PATIENCE  # the collective may fail before the process counts as dead
        while self._processes and self._dead() is None and time.monotonic() < until:
            time.sleep(POLL)
        if self._dead() is not None:
            text = self._obituary()
            self._end_others()
            raise InputError(text) from error

    @property
    def _processes(self) -> list[Any]:
        return list(getattr(self.trainer.strategy.launcher, "procs", []))

    def _watch(self) -> None:
        while not self._over.wait(POLL):
            for thread in threading.enumerate():
                if thread.name == "child-process-observer":  # Lightning's own, which kills without a word
                    thread._run = lambda: True  # type: ignore[attr-defined]  # what it does when it wakes: be done
            if self._dead() is None or self._over.wait(GRACE):
                continue
            sys.stderr.write(f"\nsmalto train: {self._obituary()}\n")
            sys.stderr.flush()
            with suppress(Exception):
                for logger in self.trainer.loggers:
                    logger.finalize("failed")
            self._end_others()
            os._exit(1)

    def _dead(self) -> tuple[int, int] | None:
        """Local rank and return code of the first process found that failed."""
        for number, process in enumerate(self._processes, start=1):
            if process.poll():
                return number, process.returncode
        return None

    def _obituary(self) -> str:
        found = self._dead()
        assert found is not None
        rank, code = found
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
        node = self.trainer.node_rank
        path = log_of_rank(self.folder, rank, node)
        lines: deque[str] = deque(maxlen=TAIL)
        with suppress(OSError), path.open(errors="replace") as file:
            for line in file:
                if line.startswith(BEGIN):  # of this run, not of those before it
                    lines.clear()
                elif line.strip():
                    lines.append(line.rstrip())
        tail = "".join(f"\n    {line}" for line in lines) or " (nothing)"
        return (
            f"the process of rank {rank}{f' on node {node}' if node else ''} {how}, so the run has ended; "
            f"the same command continues from the last checkpoint. The end of {path}:{tail}"
        )

    def _end_others(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
