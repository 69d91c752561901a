"""The jobs of a sweep as a small table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENDED = ("finished", "kept")
"""Status of a job that needs nothing more: it ended now, or had ended before."""


def sweep_report(records: Sequence[dict[str, Any]], swept: Sequence[str], folder: Path) -> str:
    """Table of jobs, then what failed and how to go on.

    Args:
        records: ``job, overrides, status`` and, where known, ``metric, value, seconds, error, log`` of each.
        swept: keys shown.
        folder: of the sweep.
    """
    rows = [["job", "overrides", "status", "metric", "seconds"]]
    for record in records:
        shown = [each for each in record["overrides"] if each.split("=", 1)[0] in swept]
        value = f"{record['metric']} {record['value']:.5g}" if "metric" in record else ""
        seconds = f"{record['seconds']:.0f}" if record.get("seconds") is not None else ""
        rows.append([str(record["job"]), " ".join(shown), record["status"], value, seconds])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for record in records:
        if record["status"] == "failed":
            shown = [each for each in record["overrides"] if each.split("=", 1)[0] in swept]
            lines += ["", f"job {record['job']} failed: {' '.join(shown)}"]
            lines += [f"  {record.get('error', '')}", f"  log: {record.get('log', '')}"]
    undone = sum(record["status"] not in ENDED for record in records)
    lines += ["", f"sweep: {folder}"]
    if undone:
        lines += [f"{undone} of {len(records)} job(s) to do: smalto resume {folder}"]
    return "\n".join(lines) + "\n"
