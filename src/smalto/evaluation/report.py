"""Scores for people and for programs: a table, and plain data for JSON and MLflow."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from smalto.errors import printable
from smalto.metrics.scores import Scores


@dataclass
class Measured:
    """Scores and under which settings they were measured.

    Args:
        scores: of one setting.
        settings: what differs from the other rows of the same evaluation: guidance, number of samples; plain values.
    """

    scores: Scores
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short name of the settings: ``cfg_scale=2,num_samples=1000``."""
        return ",".join(f"{key}={short(value)}" for key, value in self.settings.items())

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "settings": self.settings,
            "metrics": self.scores.values,
            "standard_errors": self.scores.errors,
            "not_computed": self.scores.missing,
        }

    @classmethod
    def from_plain(cls, found: dict[str, Any]) -> "Measured":
        """From what `plain` gave."""
        return cls(Scores(found["metrics"], found["standard_errors"], found["not_computed"]), found["settings"])


def short(value: Any) -> str:
    """For names: ``1`` and ``1.5``, all digits where they are needed to tell one value from another."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def flat(rows: list[Measured]) -> dict[str, float]:
    """All values in one dict; with several rows their settings stand before the names: ``cfg_scale=2/fid_...``."""
    if len(rows) == 1:
        return dict(rows[0].scores.values)
    return {f"{row.label}/{name}": value for row in rows for name, value in row.scores.values.items()}


def show(rows: list[Measured], protocol: dict[str, Any]) -> None:
    """The table to stdout, then what was not computed and why, then the protocol."""
    console = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 160)
    console.print(_list(rows[0].scores) if len(rows) == 1 else _grid(rows, protocol.get("features", "")))
    missing = {name: reason for row in rows for name, reason in row.scores.missing.items()}
    lines = [f"not computed: {name}: {reason}" for name, reason in missing.items()]
    lines += [f"{key}: {value}" for key, value in protocol.items()]
    console.print(printable("\n".join(lines)), highlight=False)


def _list(scores: Scores) -> Table:
    table = Table(title="smalto evaluate", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("std. error", justify="right")
    for name, value in scores.values.items():
        table.add_row(name, _number(value), _number(scores.errors[name]) if name in scores.errors else "")
    return table


def _grid(rows: list[Measured], features: str) -> Table:
    """One row per setting, the extractor in the title; what one row alone has (the loss) is in the JSON only."""
    table = Table(title=f"smalto evaluate, features {features}", title_justify="left")
    settings = list(rows[0].settings)
    found = Counter(name for row in rows for name in row.scores.values)
    names = [name for name, count in found.items() if count > 1]
    for name in (*settings, *names):
        table.add_column(name.removesuffix(f"_{features}"), justify="right")
    for row in rows:
        numbers = (_number(row.scores.values[name]) if name in row.scores.values else "" for name in names)
        table.add_row(*(short(row.settings[name]) for name in settings), *numbers)
    return table


def _number(value: float) -> str:
    return (
        f"{value:.1f}" if abs(value) >= 100 else f"{value:.4f}" if abs(value) >= 1e-3 or not value else f"{value:.2e}"
    )
