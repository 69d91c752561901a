"""Long measurements that a kill does not undo: their sums in a file now and then."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from smalto.files import replacing
from smalto.tasks.torch_file import read_torch_file

log = logging.getLogger(__name__)

SAVE_SECONDS = 60.0
"""A measurement that was killed loses no more than this."""


class Resumable(Protocol):
    """Metrics that can be put aside."""

    def state(self) -> dict[str, Any]:
        """Everything seen so far."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Begun:
    """A measurement on its way.

    Args:
        file: where it is put aside; its name must depend on all that decides the sums.
        metrics: what is measured.
    """

    def __init__(self, file: Path, metrics: Resumable) -> None:
        self._file, self._metrics = file, metrics
        self._saved = time.monotonic()

    def restore(self, extra: Any = None) -> tuple[int, Any]:
        """Number of batches that the metrics have seen already, and what was kept beside them (else ``extra``).

        A file that cannot be used is dropped with a warning: it saves time, and decides nothing.
        """
        fresh = self._metrics.state()
        try:
            state: dict[str, Any] = read_torch_file(self._file)
            self._metrics.load_state(state["metrics"])
            return int(state["done"]), state["extra"]
        except FileNotFoundError:
            return 0, extra
        except Exception as error:  # a damaged file fails in ways that are nobody's list
            log.warning("%s cannot be read (%s); measuring from the beginning", self._file, error)
            self._metrics.load_state(fresh)
            self.remove()
            return 0, extra

    def save(self, done: int, extra: Any = None) -> None:
        """Put it aside after ``done`` batches, if the last time is long ago."""
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as unfinished:
            torch.save({"metrics": self._metrics.state(), "done": done, "extra": extra}, unfinished)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """There is a result now."""
        self._file.unlink(missing_ok=True)


def batches(indices: range, size: int) -> Iterator[range]:
    """Consecutive parts of at most ``size``."""
    for start in range(indices.start, indices.stop, size):
        yield range(start, min(start + size, indices.stop))
