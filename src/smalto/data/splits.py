"""Which record goes to training, which to validation, and in what order they are stored."""

import hashlib
from typing import Any, Literal

import numpy as np

from smalto.data.sources import Source
from smalto.errors import InputError


def plan_splits(
    source: Source,
    split: Literal["auto", "source", "hash"],
    val_fraction: float,
    limit: int | None,
    rng: np.random.Generator | None,
) -> dict[str, np.ndarray]:
    """Record numbers of ``train`` and ``val`` in the order they are stored.

    Of a source's own split, ``train`` trains; ``val`` validates, or ``test`` where there is no ``val``
    (with one, ``test`` is left out). A drawn split hashes the name of the record: it stays when records
    are added.

    Raises:
        ValueError: ``split=source`` and a record has none.
    """
    order = np.arange(len(source)) if rng is None else source.order(rng)
    own = [source.split(int(index)) for index in order]
    if split == "source" and None in own:
        name = source.name(int(order[own.index(None)]))
        raise InputError(f"split=source, but {name} belongs to no split; use split=hash with val_fraction")
    if split == "source" or (split == "auto" and own and None not in own):
        held_out = "val" if "val" in map(_plain_split, own) else "test"
        sides = [{"train": "train", held_out: "val"}.get(_plain_split(s) or "") for s in own]
    else:
        bound = val_fraction * 2.0**64
        sides = ["val" if _hash(source.name(int(i))) < bound else "train" for i in order]
    order, kept = order[:limit], np.array(sides[:limit], dtype=object)
    return {name: order[kept == name] for name in ("train", "val") if (kept == name).any()}


def _plain_split(name: str | None) -> str | None:
    return "val" if name in ("valid", "validation", "dev") else name


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def listing(source: Source, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the source gives, short enough to compare: a renamed or added file changes it."""
    names = hashlib.sha256()
    for order in splits.values():
        for index in order:
            names.update(source.name(int(index)).encode() + b"\0")
    return {"records": {name: len(order) for name, order in splits.items()}, "sha256": names.hexdigest()}
