"""Which record goes to training, which to validation, and in what order they are stored."""

import hashlib
from typing import Any, Literal

import numpy as np

from smalto.data.annotations import SPLITS, split_word
from smalto.data.foreign import one_line
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
        ValueError: a word that is no split, or records without one among records with one: a split that is drawn
            anew would put held-out images into training.
    """
    order = np.arange(len(source)) if rng is None else source.order(rng)
    own = [None] * len(order) if split == "hash" else [source.split(int(index)) for index in order]
    missing = [i for i, word in enumerate(own) if word is None or not str(word).strip()]
    if missing and (split == "source" or len(missing) < len(own)):
        name = one_line(source.name(int(order[min(missing, key=lambda i: order[i])])))
        raise InputError(
            f"split={split}, but {name} belongs to no split ({len(missing)} of {len(own)} records do not); give it "
            "one, or use split=hash with val_fraction for all"
        )
    if own and not missing:
        words = [split_word(word) for word in own]
        if None in words:
            unknown = sorted({str(word) for word, known in zip(own, words, strict=True) if known is None})
            name = one_line(source.name(int(order[words.index(None)])))
            raise InputError(
                f"{', '.join(map(repr, unknown[:5]))}: no split is called so ({name}); use {', '.join(SPLITS)}, or "
                "split=hash with val_fraction"
            )
        held_out = "val" if "val" in words else "test"
        sides = [{"train": "train", held_out: "val"}.get(word or "") for word in words]
    else:
        bound = val_fraction * 2.0**64
        sides = ["val" if _hash(source.name(int(i))) < bound else "train" for i in order]
    order, kept = order[:limit], np.array(sides[:limit], dtype=object)
    return {name: order[kept == name] for name in ("train", "val") if (kept == name).any()}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8])


def listing(source: Source, splits: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the source gives, short enough to compare: a renamed or added file changes it."""
    names = hashlib.sha256()
    for order in splits.values():
        for index in order:
            names.update(source.name(int(index)).encode(errors="surrogateescape") + b"\0")
    return {"records": {name: len(order) for name, order in splits.items()}, "sha256": names.hexdigest()}
