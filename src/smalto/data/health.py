"""Whether a data set on disk is what its meta.json says."""

import hashlib
import json
from pathlib import Path
from typing import Any

from smalto.data.progress import progress
from smalto.data.shards import CODES, IMAGES, META, meta_problems

FORMATS = (IMAGES, CODES)


def shard_meta(path: Path) -> dict[str, Any] | None:
    """The meta.json in ``path`` if it is one of ours, unchecked; None otherwise."""
    try:
        meta = json.loads((path / META).read_text())
        return meta if meta["format"] in FORMATS else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shard_problems(path: Path, meta: dict[str, Any], *, verify: bool) -> list[str]:
    """What is wrong with the shards, one line each; empty when nothing is.

    Args:
        path: folder of the set.
        meta: its meta.json.
        verify: read every byte and compare hashes; otherwise only names and sizes are compared.
    """
    problems = [f"{META}: {problem}" for problem in meta_problems(meta)]
    if problems:  # what it says of the shards cannot be compared with them
        return problems
    shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
    listed = {shard["name"] for shard in shards}
    problems += [f"{p.name} is there but not in {META}" for p in sorted(path.glob("*.tar")) if p.name not in listed]
    for shard in shards:
        file = path / shard["name"]
        if not file.is_file():
            problems.append(f"{file.name} is missing")
        elif file.stat().st_size != shard["bytes"]:
            problems.append(f"{file.name} has {file.stat().st_size} bytes instead of {shard['bytes']}")
    return problems + (_changed(path, shards) if verify else [])


def _changed(path: Path, shards: list[dict[str, Any]]) -> list[str]:
    problems = []
    whole = [s for s in shards if (path / s["name"]).is_file() and (path / s["name"]).stat().st_size == s["bytes"]]
    with progress("verify", total=sum(shard["bytes"] for shard in whole), unit="bytes") as advance:
        for shard in whole:
            digest = hashlib.sha256()
            with (path / shard["name"]).open("rb") as file:
                while part := file.read(2**22):
                    digest.update(part)
                    advance(len(part))
            if digest.hexdigest() != shard["sha256"]:
                problems.append(f"{shard['name']} has changed: its SHA-256 is not the one in {META}")
    return problems
