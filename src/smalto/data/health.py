"""Whether a data set on disk is what its meta.json says."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from smalto.data.content import file_hash
from smalto.data.meta import meta_problems, read_json
from smalto.data.progress import progress
from smalto.data.shards import CODES, IMAGES, META
from smalto.errors import InputError

log = logging.getLogger(__name__)

FORMATS = (IMAGES, CODES)
VERIFIED_BYTES = 32e9
"""Up to so much is hashed before work begins: a minute at 550 MB/s."""


def shard_meta(path: Path) -> dict[str, Any] | None:
    """The meta.json in ``path`` if it is one of ours, unchecked; None otherwise."""
    try:
        meta = read_json(path / META)
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


def require_unchanged(path: Path, shards: list[dict[str, Any]]) -> None:
    """Compare shards that carry no checksums of their own with the hashes in meta.json.

    Raises:
        ValueError: some are not what was written.
    """
    hashed = [shard for shard in shards if "sha256" in shard]
    size = sum(shard["bytes"] for shard in hashed)
    if size > VERIFIED_BYTES:
        log.warning(
            "%s has no checksums of its rows and is too large (%.0f GB) to be compared with %s at every start: "
            "smalto inspect path=%s verify=true does so, extracted again it has them",
            path,
            size / 1e9,
            META,
            path,
        )
        return
    problems = _changed(path, hashed)
    if problems:
        raise InputError(
            f"{path} is damaged: {'; '.join(problems)}; restore the files, or extract again with overwrite=true "
            "(data.verify=false takes them as they are)"
        )


def _changed(path: Path, shards: list[dict[str, Any]]) -> list[str]:
    whole = [s for s in shards if (path / s["name"]).is_file() and (path / s["name"]).stat().st_size == s["bytes"]]
    with (
        progress("verify", total=sum(shard["bytes"] for shard in whole), unit="bytes") as advance,
        ThreadPoolExecutor(4) as pool,
    ):
        digests = pool.map(lambda shard: file_hash(path / shard["name"], advance), whole)
        return [
            f"{shard['name']} has changed: its SHA-256 is not the one in {META}"
            for shard, digest in zip(whole, digests, strict=True)
            if digest != shard["sha256"]
        ]
