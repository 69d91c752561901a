"""The figure of the study of damaged images: every metric against the strength of every damage."""

from typing import Any

import pandas as pd

from smalto.analysis.plots import NAMES

DAMAGES = {
    "blur": ("blur", "sigma, px"),
    "noise": ("noise", "std, grey levels"),
    "jpeg": ("JPEG", "100 - quality"),
    "dropped_classes": ("dropped classes", "classes left out"),
    "duplicates": ("duplicates", "share of copies"),
}
"""Title and unit of the level."""

METRICS = {"fid": "features", "precision": "features", "recall": "features", "lpips": "perceptual", "psnr": None}
"""Rows of the figure, and the column that names the network behind each."""


def damage_curves(table: pd.DataFrame, *, axes: Any = None) -> Any:
    """Small multiples: a row per metric, a column per damage; grey, what undamaged real images score.

    A row shares its scale, so that a metric that sees nothing of a damage is a flat line.

    Args:
        table: as :func:`smalto.analysis.damage_study.study` gives.
        axes: (5, number of damages) Axes that share x in columns and y in rows; None makes a new figure.
    """
    damages = table["damage"].unique()
    if axes is None:
        from matplotlib import pyplot

        size = (2.4 * len(damages), 1.8 * len(METRICS))
        figure = pyplot.figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(METRICS), len(damages), sharex="col", sharey="row", squeeze=False)
    for column, damage in zip(axes.T, damages, strict=True):
        line = table[table["damage"] == damage].sort_values("level")
        title, unit = DAMAGES[damage]
        column[0].set_title(title)
        column[-1].set_xlabel(unit)
        for ax, metric in zip(column, METRICS, strict=True):
            ax.axhline(line[metric].iloc[0], color="0.6", linestyle="--", linewidth=1)
            ax.plot(line["level"], line[metric], "o-", markersize=4)
            ax.grid(alpha=0.2)
    for ax, (metric, network) in zip(axes[:, 0], METRICS.items(), strict=True):
        ax.set_ylabel(NAMES.get(metric, metric.upper()) + (f"\n{table[network].iloc[0]}" if network else ""))
        ax.set_ylim(bottom=0, top=1 if metric in ("precision", "recall") else None)
    return axes
