"""Writing shards: plain tar with the same bytes for the same content, committed by rename."""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import Any, Self

import numpy as np

from smalto.files import commit, temporary_name


def npy_bytes(array: np.ndarray) -> bytes:
    """``array`` in the .npy format."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


class TarShard:
    """One shard being written under another name; ``close`` names it, leaving the block early removes it.

    Owner, time and mode are fixed, so equal members in equal order are equal bytes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = temporary_name(path)
        self._file = self._temporary.open("wb")
        self._hash = hashlib.sha256()
        self._bytes = 0

    def add(self, name: str, data: bytes) -> None:
        """Append a member; ``name`` is ASCII, at most 100 characters."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._write(info.tobuf(tarfile.USTAR_FORMAT, "ascii"))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))

    def close(self) -> dict[str, Any]:
        """Commit; the record for meta.json: name, bytes, sha256."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        commit(self._temporary, self._path)
        return {"name": self._path.name, "bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._file.closed:
            self._temporary.unlink(missing_ok=True)
            self._file.close()
