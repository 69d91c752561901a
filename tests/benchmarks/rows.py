"""One line of the table of speeds, and the authors' code where a checkout is at hand."""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from types import ModuleType


@dataclass(frozen=True)
class Row:
    """A measured figure.

    Args:
        name: what was measured, against what.
        ours: our median, in ``unit``.
        baseline: the other side's median.
        ratio: median over the rounds of ours by theirs, whatever the unit: below 1 we need less.
        unit: of ``ours`` and ``baseline``.
    """

    name: str
    ours: float
    baseline: float
    ratio: float
    unit: str


def time_row(name: str, seconds: Mapping[str, list[float]], ours: str, theirs: str, *, items: int = 1) -> Row:
    """Seconds per item of two contestants of :func:`benchmarks.paired.interleave`."""
    ratio = median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    return Row(name, median(seconds[ours]) / items, median(seconds[theirs]) / items, ratio, "s")


def peer_module(peer: str, name: str) -> ModuleType:
    """A module of the authors' checkout, imported unchanged."""
    if peer not in sys.path:
        sys.path.append(peer)
    return importlib.import_module(name)


def arguments(given: list[str]) -> dict[str, str]:
    """``key=value`` words."""
    return dict(word.split("=", 1) for word in given)
