"""The figures of the notebooks. Each draws into the Axes it is given, or new ones, and returns them.

Matplotlib is imported where it is used: the package runs without it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from smalto.analysis.power_law import PowerLaw
from smalto.analysis.tables import CONTROLS

NAMES = {
    "step": "step",
    "loss": "validation loss, nats per code",
    "fid": "FID",
    "is": "Inception score",
    "rfid": "rFID",
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "usage": "codebook usage, %",
    "precision": "precision",
    "recall": "recall",
    "parameters": "parameters",
    "forward_flops": "FLOPs of one image, forward",
    "training_flops": "training FLOPs",
    "codebook_dim": "codebook dimension",
    "codebook_size": "codebook size",
    "cfg_scale": "guidance scale",
    "top_k": "top-k",
    "top_p": "top-p",
    "temperature": "temperature",
}
REFERENCE = {"color": "0.6", "linestyle": "--", "marker": "o", "markersize": 4}


def learning_curves(curves: pd.DataFrame, *, labels: Mapping[str, str], value: str = "loss", ax: Any = None) -> Any:
    """One line per run.

    Args:
        curves: ``run_id, step, value``, as :func:`smalto.analysis.runs.curves` gives.
        labels: run id to legend entry, in the order of the legend.
        value: what the values are, a key of ``NAMES`` or words.
        ax: where; None makes new Axes.
    """
    ax = _axes(ax, "step", value)
    for run_id, label in labels.items():
        line = curves[curves["run_id"] == run_id]
        ax.plot(line["step"], line["value"], label=label)
    return _legend(ax)


def scaling_curve(table: pd.DataFrame, *, x: str, y: str, law: PowerLaw | None = None, ax: Any = None) -> Any:
    """A metric against size on a logarithmic axis, with the fitted law, its interval and the sizes' names.

    Args:
        table: columns ``x``, ``y`` and ``label``.
        x: ``parameters``, ``forward_flops`` or ``training_flops``.
        y: ``loss`` or ``fid``; a network in a column ``features`` is named on the axis.
        law: of these points; None draws the points only.
        ax: where; None makes new Axes.
    """
    ax = _axes(ax, x, y, network=_network(table, y))
    table = table.dropna(subset=[x, y])
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter("")  # within a decade they overlap; the points carry names
    ax.margins(x=0.12)
    if law is not None:
        grid = np.geomspace(law.x.min(), law.x.max(), 100)
        (line,) = ax.plot(grid, law(grid), label=f"{law.a:.3g} x^-{law.b:.3g} + {law.c:.3g}")
        low, high = law.band(grid)
        if np.isfinite(low).all():
            ax.fill_between(grid, low, high, alpha=0.15, color=line.get_color(), label=f"{law.confidence:.0%} interval")
    ax.plot(table[x], table[y], "o", color="black")
    for _, row in table.drop_duplicates("label").iterrows():
        ax.annotate(row["label"], (row[x], row[y]), textcoords="offset points", xytext=(4, 6))
    return _legend(ax)


def codebook_curve(
    table: pd.DataFrame, *, x: str, y: str, reference: pd.DataFrame | None = None, ax: Any = None
) -> Any:
    """A tokenizer metric against one property of the codebook, with the paper's points in grey.

    Args:
        table: as :func:`smalto.analysis.tables.codebook_table` gives; may be empty.
        x: ``codebook_dim`` or ``codebook_size``; of the other, the value with most points is kept.
        y: ``rfid``, ``psnr``, ``ssim`` or ``usage``.
        reference: points of the paper, same columns. rFID by another network than the table's gets an axis of its own:
            the two scales have nothing in common.
        ax: where; None makes new Axes.
    """
    table, points = one_varies(table, x), one_varies(pd.DataFrame() if reference is None else reference, x)
    network, theirs = _network(table, y), _network(points, y)
    ax = _axes(ax, x, y, network=network or theirs)
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks := sorted({value for part in (table, points) if len(part) for value in part[x]}), ticks)
    if len(points):
        separate = None not in (network, theirs) and network != theirs
        grey = ax.twinx() if separate else ax
        grey.plot(points[x], points[y], label="paper", **REFERENCE)
        if separate:
            grey.set_ylabel(f"paper: {NAMES[y]} ({theirs})", color=REFERENCE["color"])
            grey.legend(frameon=False, loc="upper right", fontsize="small")
    if len(table):
        mean = table.groupby(x)[y].mean()  # over seeds
        ax.plot(mean.index, mean, "o-", label="measured")
    return _legend(ax)


def sampling_curve(
    table: pd.DataFrame, *, x: str, y: str, by: str | None = None, reference: bool = False, ax: Any = None
) -> Any:
    """A metric of samples against a sampling control, or against another metric.

    Args:
        table: as :func:`smalto.analysis.tables.sampling_table` gives.
        x: a control, or a metric. ``top_k`` is drawn evenly spaced, 0 as "all" at the right end.
        y: ``fid``, ``is``, ``precision`` or ``recall``.
        by: column that names the lines; None draws one.
        reference: dashed, for numbers of the paper.
        ax: where; None makes new Axes.
    """
    ax = _axes(ax, x, y, network=_network(table, y))
    style: dict[str, Any] = {"linestyle": "--", "marker": "o", "markersize": 4} if reference else {"marker": "o"}
    ranks = sorted(table[x].unique(), key=lambda k: k or np.inf) if x == "top_k" else []
    if ranks:
        table = table.assign(top_k=table["top_k"].map(ranks.index))
    for name, line in [("", table)] if by is None else table.groupby(by, sort=False):
        line = line.sort_values(x if x in CONTROLS else "cfg_scale")  # a metric moves back and forth along the curve
        ax.plot(line[x], line[y], label=f"paper, {name}" if reference else str(name), **style)
    if ranks:
        ax.set_xticks(range(len(ranks)), ["all" if k == 0 else f"{k:g}" for k in ranks])
    return _legend(ax)


def one_varies(table: pd.DataFrame, x: str) -> pd.DataFrame:
    """The rows of a cross of two properties that lie on the arm along ``x``, ascending."""
    other = {"codebook_dim": "codebook_size", "codebook_size": "codebook_dim"}[x]
    if table.empty:
        return table
    arm = table.groupby(other)[x].nunique().idxmax()
    return table[table[other] == arm].sort_values(x)


def _axes(ax: Any, x: str, y: str, *, network: str | None = None) -> Any:
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(figsize=(5, 3.5), layout="constrained")[1]
    ax.set_xlabel(NAMES.get(x, x))
    ax.set_ylabel(NAMES.get(y, y) + (f" ({network})" if network else ""))
    ax.grid(alpha=0.2)
    return ax


def _network(table: pd.DataFrame, y: str) -> str | None:
    """The feature network behind a metric that depends on one."""
    if y not in ("fid", "is", "rfid", "precision", "recall") or "features" not in table or table.empty:
        return None
    found = table["features"].dropna()
    return None if found.empty else str(found.iloc[0])


def _legend(ax: Any) -> Any:
    if any(label and not label.startswith("_") for label in ax.get_legend_handles_labels()[1]):
        ax.legend(frameon=False, fontsize="small")
    return ax
