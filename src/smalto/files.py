"""Files that appear whole or not at all, and files that one process at a time may hold."""

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from smalto.errors import PathInUse, StorageError

log = logging.getLogger(__name__)

TEMPORARY = re.compile(r".+\.[0-9a-f]{8}\.tmp")
"""Names of files that were being written; what a killed process left of them may be removed."""


@contextmanager
def replacing(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write a file to, the writer's own; it becomes ``path`` when the block ends well.

    On the disk before it has the name, so that a power cut leaves the old file or the new one. Several processes may
    do this to one path at a time: each writes a file of its own, and the last one stays.

    Args:
        path: of the file.
        lasting: False: not on the disk yet, for one of many small files that are looked at before they are trusted.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        if lasting:
            sync(temporary)
            commit(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else has."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Rename, and make the rename itself last through a power cut."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """``value`` as indented JSON at ``path``, whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


class FileLock:
    """The right to work somewhere, held by one process: a locked file that says whose it is.

    The system frees it when its holder ends, however it ends, and all that inherited its descriptor have ended. A file
    system without locks answers as if all were free, with a warning.

    Args:
        path: of the file, made if missing. It is never followed through a link and nothing is removed from it but
            the name of the last holder.
        keep: leave the file where it is when it is given back; else it is removed.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        self.path = path
        self._keep = keep
        self._descriptor: int | None = None

    def acquire(self, *, patience: float = 0.0) -> None:
        """Hold it.

        Args:
            patience: seconds to wait for somebody else. One that died is waited for in any case, up to 10 s: its
                workers still hold the file for a moment.

        Raises:
            PathInUse: somebody else holds it.
            StorageError: the file is a link, or no plain file.
        """
        began = time.monotonic()
        while not self.try_acquire():
            owner = self.owner()
            waited = time.monotonic() - began
            if waited >= (max(patience, 10.0) if _is_dead(owner) else patience):
                raise PathInUse(f"{self.path.parent} is in use by {owner or 'another process'}")
            time.sleep(0.1)

    def try_acquire(self) -> bool:
        """Hold it if nobody else does; returns whether that is so."""
        descriptor = self._open()
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            log.warning("%s cannot be locked (%s)", self.path, error.strerror)
        # Between opening and locking, its last holder may have removed the file: then others cannot see ours.
        try:
            known = os.stat(self.path, follow_symlinks=False).st_ino == os.fstat(descriptor).st_ino
        except FileNotFoundError:
            known = False
        if not known:
            os.close(descriptor)
            return self.try_acquire()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{_OWNER.format(pid=os.getpid(), host=socket.gethostname())}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def _open(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags, 0o644)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise StorageError(f"{self.path} is a link, or no plain file; remove it") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise StorageError(f"{self.path} is no plain file; remove it")
        return descriptor

    def owner(self) -> str:
        """Who holds it, as far as the file tells."""
        try:
            with os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                return file.read(200).decode(errors="replace").strip()
        except OSError:
            return ""

    def fileno(self) -> int:
        """The open file; a process that inherits it holds the lock too."""
        assert self._descriptor is not None
        return self._descriptor

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is None:
            return
        if not self._keep:
            self.path.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> Self:
        if self._descriptor is None:
            self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()


_held: set[Path] = set()


@contextmanager
def alone_in(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold ``folder``, which is made if it is missing; within it once more is no second time.

    Args:
        folder: where only one may work.
        patience: seconds to wait for somebody else, who saves and stops.

    Raises:
        PathInUse: another process works there.
        StorageError: nothing can be written there.
    """
    place = folder.resolve()
    if place in _held:
        yield
        return
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(patience=patience)
    except PathInUse as error:
        raise PathInUse(f"{error}; wait until it has ended, or stop it, and give the same command again") from None
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be written to: {error.strerror or error}; choose another folder"
        ) from error
    with lock:
        _held.add(place)
        try:
            yield
        finally:
            _held.remove(place)


_OWNER = "process {pid} on {host}"


def _is_dead(owner: str) -> bool:
    """Whether the process named in a lock file ran on this machine and is gone."""
    found = re.fullmatch(_OWNER.format(pid=r"(\d+)", host=re.escape(socket.gethostname())), owner)
    if not found:
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False
