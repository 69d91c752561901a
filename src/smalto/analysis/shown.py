"""What a notebook shows: your runs from MLflow if there are enough to compare, else a file beside the notebook."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from smalto.errors import InputError


@dataclass(frozen=True)
class Shown:
    """What a notebook shows, and where it is from.

    Args:
        table: rows to draw.
        origin: one line for the reader.
        tracking_uri: of the MLflow store it was read from; None for a bundled file.
    """

    table: pd.DataFrame
    origin: str
    tracking_uri: str | None


def shown(
    select: Callable[[pd.DataFrame], pd.DataFrame], bundled: Path | None, *, tracking_uri: str | None = None
) -> Shown:
    """The runs that ``select`` finds in MLflow; if there are too few, the bundled file, or nothing without one.

    Args:
        select: a function of :mod:`smalto.analysis.tables`.
        bundled: a CSV file as :func:`write_csv` makes.
        tracking_uri: None takes ``$MLFLOW_TRACKING_URI``, else ``mlflow.db`` in ``$SMALTO_OUTPUTS`` or ``outputs/``.
    """
    uri = tracking_uri or default_tracking_uri()
    if not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists():
        with warnings.catch_warnings():  # tqdm asks notebooks for widgets; no bar is shown here
            warnings.filterwarnings("ignore", message=".*IProgress.*")
            from smalto.analysis.runs import runs_table  # MLflow takes seconds to import, only where it is read

        table = select(runs_table(uri, step_of="val/loss"))
        if len(table):
            return Shown(table, f"MLflow: {len(table)} rows of your own from {uri}", uri)
    if bundled is None:
        return Shown(select(pd.DataFrame()), f"none of your own: too few runs to compare in {uri}", None)
    table, origin = read_csv(bundled)
    return Shown(table, f"bundled file {bundled.name}, too few runs to compare in {uri}. {origin}", None)


def metric_curves(source: Shown, metric: str, bundled: Path) -> pd.DataFrame:
    """``run_id, step, value`` of the runs of ``source``, from where that came from.

    Args:
        source: a table with a ``run_id`` column.
        metric: for instance ``val/loss``.
        bundled: a CSV file with ``run_id, metric, step, value``.
    """
    if source.tracking_uri is None:
        table, _ = read_csv(bundled)
        return table.loc[table["metric"] == metric, ["run_id", "step", "value"]].reset_index(drop=True)
    from smalto.analysis.runs import curves

    return curves(source.tracking_uri, source.table["run_id"], metric)


def default_tracking_uri() -> str:
    """Where the commands record, as seen from the checkout or from a folder in it."""
    outputs = Path(os.environ.get("SMALTO_OUTPUTS", project_folder() / "outputs"))
    return os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{outputs.absolute()}/mlflow.db")


def project_folder() -> Path:
    """The checkout that the working directory lies in, else the working directory."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks" / "data").is_dir()), here)


def bundled_file(name: str) -> Path:
    """A file of ``notebooks/data``."""
    return project_folder() / "notebooks" / "data" / name


def read_csv(path: Path) -> tuple[pd.DataFrame, str]:
    """A table and the sentences in its leading ``#`` lines.

    Raises:
        ValueError: a file that does not say where its numbers are from.
    """
    lines = path.read_text().splitlines()
    origin = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    if not origin:
        raise InputError(f"{path} does not say where it is from; write it with smalto.analysis.shown.write_csv")
    return pd.read_csv(path, comment="#"), origin


def write_csv(table: pd.DataFrame, path: Path, *, origin: str) -> None:
    """A table under ``#`` lines that say where it is from; five digits of what is not an integer."""
    unfinished = path.with_name(path.name + ".tmp")
    head = "".join(f"# {line}\n" for line in origin.splitlines())
    unfinished.write_text(head + table.to_csv(index=False, float_format="%.5g", lineterminator="\n"))
    unfinished.replace(path)
