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
        ours: our median, in ``unit``; None where it could not be measured, ``note`` says why.
        baseline: the other side's median; None where there is no other side.
        ratio: median over the rounds of ours by theirs, whatever the unit: below 1 we need less.
        unit: of ``ours`` and ``baseline``.
        goal: what ``ratio`` should be: ``<= 0.25`` or ``>= 0.62``; empty without one.
        comparable: whether the goal is about this other side; False while a stand-in is at its place.
        note: what else there is to know.
    """

    name: str
    ours: float | None
    baseline: float | None
    ratio: float | None
    unit: str
    goal: str = ""
    comparable: bool = True
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is; None where that cannot be said."""
        if not self.goal or self.ratio is None or not self.comparable:
            return None
        direction, bound = self.goal.split()
        return self.ratio <= float(bound) if direction == "<=" else self.ratio >= float(bound)


NO_BF16 = "this processor has no units for bfloat16; emulated it is slower than float32"


def unmeasured(name: str, *, goal: str = "", note: str = NO_BF16) -> Row:
    """A row without figures, and why."""
    return Row(name, None, None, None, "", goal, note=note)


def time_row(
    name: str,
    seconds: Mapping[str, list[float]],
    ours: str,
    theirs: str,
    *,
    items: int = 1,
    goal: str = "",
    comparable: bool = True,
) -> Row:
    """Seconds per item of two contestants of :func:`benchmarks.paired.interleave`."""
    ratio = median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))
    medians = (median(seconds[name]) / items for name in (ours, theirs))
    return Row(name, *medians, ratio, "s", goal, comparable)


def peer_module(peer: str, name: str) -> ModuleType:
    """A module of the authors' checkout, imported unchanged."""
    if peer not in sys.path:
        sys.path.append(peer)
    return importlib.import_module(name)


def arguments(given: list[str]) -> dict[str, str]:
    """``key=value`` words."""
    return dict(word.split("=", 1) for word in given)
