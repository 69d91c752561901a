"""Rows of the report, and the report."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

OK, BAD, ABSENT = "ok", "NOT OK", "not here"


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Args:
        what: in words.
        value: what was seen.
        verdict: ``OK``, ``BAD`` or ``ABSENT``: this machine has no such thing.
    """

    what: str
    value: str
    verdict: str = OK


def judged(what: str, value: str, good: bool) -> Row:
    """A row with a verdict."""
    return Row(what, value, OK if good else BAD)


def machine(device: torch.device) -> list[Row]:
    """What it was seen on."""
    rows = [Row("torch", f"{torch.__version__}, Python {platform.python_version()}, {platform.system()}")]
    if device.type == "cuda":
        for i in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(i)
            capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
            rows.append(Row(f"GPU {i}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, capability {capability}"))
        rows.append(Row("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"))
    else:
        kernels = torch.backends.cpu.get_cpu_capability()
        rows.append(Row("CPU", f"{platform.machine()}, {kernels}, {torch.get_num_threads()} threads"))
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """A table to paste into an issue."""
    cells = [("what", "seen", "verdict"), *((row.what, row.value, row.verdict) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def save(rows: Sequence[Row], file: Path) -> None:
    """The same for programs."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
