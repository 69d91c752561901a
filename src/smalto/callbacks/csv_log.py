"""The numbers of a run in one CSV file, every step's row once, however often the run was interrupted."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from smalto.errors import StorageError
from smalto.files import write_bytes

BESIDE = frozenset({"epoch", "step"})
"""What Lightning adds to every row; no reason to write one."""


class Logged:
    """Which values a run logged before it was interrupted: those between its checkpoint and its end come again.

    Args:
        rows: step and names of values.
    """

    def __init__(self, rows: Iterable[tuple[int, Iterable[str]]] = ()) -> None:
        self._names: dict[int, set[str]] = defaultdict(set)
        for step, names in rows:
            self._names[step] |= set(names)

    def new(self, values: Mapping[str, Any], step: int | None) -> dict[str, Any]:
        """Those of ``values`` that were not logged; nothing if only what is added to every row is left."""
        known = self._names.get(step, set()) - BESIDE if step is not None else set()
        left = {name: value for name, value in values.items() if name not in known}
        return left if left.keys() - BESIDE or not known else {}


class CSVLog(Logger):
    """Logs to ``metrics.csv``, which a continued run goes on with; config and versions lie in the run folder already.

    Lightning's own begins another file whenever a run goes on, and loses all rows if it is killed when a new column
    makes it write the file again.

    Args:
        folder: of the file.
    """

    def __init__(self, *, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._logged: Logged | None = None

    @property
    def name(self) -> str:
        """Of the kind of logger."""
        return "csv"

    @property
    def version(self) -> int:
        """There is one."""
        return 0

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take a row, unless it was logged before an interruption; :meth:`save` writes it."""
        if self._logged is None:
            self._logged = self._take_up()
        row = self._logged.new({name: float(value) for name, value in metrics.items()}, step)
        if row:
            self._waiting.append(row | {"step": step})

    @rank_zero_only
    def save(self) -> None:
        """Write all rows taken so far.

        Raises:
            StorageError: the disk is full, or somebody removed the folder.
        """
        rows, self._waiting = self._waiting, []  # not tried again, if it fails, by who tidies up after that
        if not rows:
            return
        columns = sorted({*self._columns, *(name for row in rows for name in row)})
        try:
            if columns == self._columns and self.file.exists():
                with self.file.open("a") as file:
                    file.write(_lines(columns, rows))
            else:
                before = self._read()
                write_bytes(self.file, (",".join(columns) + "\n" + _lines(columns, before + rows)).encode())
        except OSError as error:
            raise StorageError(
                f"could not write {self.file}: {error.strerror or error}; is the disk full, or was the run folder "
                "removed? The same command goes on from the last checkpoint"
            ) from error
        self._columns = columns

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is left."""
        self.save()

    def _take_up(self) -> Logged:
        """Go on where the file ends; a line that a kill or a power cut left unfinished was not logged."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read()
        if rows:
            self._columns = sorted(rows[0])
            write_bytes(self.file, (",".join(self._columns) + "\n" + _lines(self._columns, rows)).encode())
        return Logged((int(row["step"]), [name for name, value in row.items() if value != ""]) for row in rows)

    def _read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        whole = self.file.read_text(errors="replace").rpartition("\n")[0].replace("\0", "")
        found = csv.DictReader(whole.splitlines())
        return [row for row in found if None not in (*row, *row.values()) and row.get("step", "").isdecimal()]


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
