"""What files hold, in one hash; what nobody has touched since is not read again."""

import hashlib
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from smalto.data.progress import Advance, progress
from smalto.files import write_bytes

SETTLED_SECONDS = 5.0
"""A file changed more recently is not remembered: file systems count time in steps of up to 2 s, and within one step it
may change again without a trace."""


def content_hash(paths: Sequence[Path], *, memory: Path | None = None) -> str:
    """SHA-256 of the contents of files in this order; their names and times make no difference.

    Args:
        paths: of the files.
        memory: folder that remembers hashes by what the file system says of the files: place, inode, size, time of the
            last change of content and of the inode (which no program can set back). None remembers nothing.

    Raises:
        OSError: a file that is not there or cannot be read.
    """
    began, seen = time.time(), _seen(paths)
    place = None if memory is None else memory / hashlib.sha256(repr(seen).encode()).hexdigest()[:32]
    known = None if place is None else _remembered(place)
    if known is not None:
        return known
    total = sum(size for *_, size, _, _ in seen)
    with progress("read", total=total, unit="bytes") as advance, ThreadPoolExecutor(4) as pool:
        digests = list(pool.map(lambda path: file_hash(path, advance), paths))
    found = hashlib.sha256("".join(digests).encode()).hexdigest()
    newest = max((max(changed, moved) for *_, changed, moved in seen), default=0)
    if place is not None and newest < (began - SETTLED_SECONDS) * 1e9 and _seen(paths) == seen:
        with suppress(OSError):  # nothing depends on it
            place.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(place, found.encode())
    return found


def _seen(paths: Sequence[Path]) -> list[tuple[str, int, int, int, int]]:
    """Path, inode, size, times in ns."""
    stats = ((str(path.absolute()), path.stat()) for path in paths)
    return [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]


def _remembered(place: Path) -> str | None:
    try:
        text = place.read_text()
    except (OSError, ValueError):
        return None
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else None


def file_hash(path: Path, advance: Advance) -> str:
    """SHA-256 of one file; ``advance`` learns of every byte."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(2**20):
            digest.update(part)
            advance(len(part))
    return digest.hexdigest()
