"""How far a long job is: a bar on a terminal, a line now and then in a log file."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0


class Advance(Protocol):
    """Says that ``count`` more are done."""

    def __call__(self, count: int) -> None:
        """Add ``count``."""
        ...


@contextmanager
def progress(name: str, *, total: int, done: int = 0, unit: str = "images") -> Iterator[Advance]:
    """Show ``name`` with done / total, rate and time left on stderr; yields the function to advance it.

    Args:
        name: of the job.
        total: all there is to do.
        done: finished by an earlier run; not counted in the rate.
        unit: what is counted.
    """
    start, state = time.monotonic(), {"now": done, "logged": time.monotonic()}

    def rate() -> float:
        return (state["now"] - done) / max(time.monotonic() - start, 1e-9)

    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(name, total=total, completed=done, rate="")

            def advance(count: int) -> None:
                state["now"] += count
                bar.update(task, advance=count, rate=f"{rate():,.0f} {unit}/s")

            yield advance
    else:

        def advance(count: int) -> None:
            state["now"] += count
            if time.monotonic() - state["logged"] > LOG_SECONDS:
                state["logged"] = time.monotonic()
                left = (total - state["now"]) / max(rate(), 1e-9)
                log.info("%s: %d of %d %s, %.0f/s, %.0f s left", name, state["now"], total, unit, rate(), left)

        yield advance
    log.info("%s: %d %s in %.1f s, %.0f/s", name, state["now"] - done, unit, time.monotonic() - start, rate())
