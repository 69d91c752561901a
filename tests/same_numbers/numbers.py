"""What a run left behind, as one flat table: a name for every number or tensor, its exact value or a hash of it."""

import csv
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from same_numbers.cases import Command

UNTIMED = ("_per_second", "mfu", "memory_peak_gb", "seconds", "tflops")
"""Ends of names of values that differ from run to run."""


def numbers(out: Path, command: Command) -> dict[str, str]:
    """Of what ``command`` wrote under ``out``, in an order in which the first difference is the earliest one."""
    folder = out / command.name
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        found |= _logged(path)
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("metrics.json", "validated.json"):
            found |= {f"{path.name} {key}": value for key, value in _leaves(json.loads(path.read_text()))}
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.exists():
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        parts = {key: content[key] for key in ("state_dict", "callbacks", "optimizer_states", "global_step")}
        found |= {f"checkpoint {key}": value for key, value in _leaves(parts)}
    for path in sorted(folder.rglob("*.npz")):
        with np.load(path) as arrays:
            found |= {f"{path.name} {key}": _hash(arrays[key]) for key in arrays.files}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                data = archive.extractfile(member)
                if data is not None:
                    found[f"{path.name} {member.name}"] = hashlib.sha256(data.read()).hexdigest()[:16]
    return found


def _logged(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return {
            f"step {int(row['step']):3d} {key}": value
            for row in csv.DictReader(file)
            for key, value in row.items()
            if value and key not in ("step", "epoch") and not key.endswith(UNTIMED)
        }


def _leaves(tree: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{place}/{key}" if place else str(key))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{place}/{i}")
    elif isinstance(tree, torch.Tensor):
        yield place, _hash(tree.detach().reshape(-1).clone().view(torch.uint8).numpy())  # bfloat16 too
    elif isinstance(tree, (int, float)) and not place.endswith(UNTIMED):
        yield place, repr(tree)


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def first_difference(before: dict[str, str], after: dict[str, str]) -> str | None:
    """The first value of ``before`` that ``after`` has not, in words; what only ``after`` has is no difference."""
    for name, value in before.items():
        if name not in after:
            return f"{name}: {value} is gone"
        if after[name] != value:
            return f"{name}: {value} before, {after[name]} now"
    return None
