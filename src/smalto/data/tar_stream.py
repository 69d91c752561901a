"""Samples out of tar shards as they come: local files, web addresses, output of commands."""

import bz2
import gzip
import io
import lzma
import subprocess
import tarfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from smalto.data.foreign import one_line, reason
from smalto.data.patterns import expand_braces, expand_paths
from smalto.data.pictures import MAX_FILE
from smalto.data.tar_members import StrictTarInfo, check_rest
from smalto.data.tar_records import is_image, record_key, roles
from smalto.errors import InputError, StorageError

T = TypeVar("T")

TIMEOUT = 60  # seconds without a byte from a server
_PASS = 3  # keeps the order of shards apart from other random numbers


def expand_urls(urls: str | Sequence[str]) -> list[str]:
    """Every shard meant by a pattern, or a list of them: paths, ``http(s)://...``, ``pipe:COMMAND``.

    Braces count in all of them, wildcards in paths.

    Raises:
        FileNotFoundError: a path matches nothing.
        ValueError: no shard at all.
    """
    found: list[str] = []
    for pattern in [urls] if isinstance(urls, str) else urls:
        remote = pattern.startswith(("http://", "https://", "pipe:"))
        found += expand_braces(pattern) if remote else map(str, expand_paths(pattern))
    if not found:
        raise InputError("urls is empty; give at least one shard")
    return found


@contextmanager
def open_shard(url: str) -> Iterator[IO[bytes]]:
    """The bytes of a shard, in one pass.

    Raises:
        OSError: missing, unreachable, or a command that failed (only known when its output is read).
    """
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            try:
                yield process.stdout
                process.stdout.read()  # a reader may stop at the end mark: the command is not to die of that
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise StorageError(f"{command} ended with code {process.returncode}")
    elif url.startswith(("http://", "https://")):
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            yield response
    else:
        with Path(url).open("rb") as file:
            yield file


class _Unpacked:
    """A stream as it is, or unpacked if it is compressed: then it may not grow beyond all proportion."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._head = stream, stream.read(len(_XZ))
        self.packed = self.unpacked = 0
        opener = next((opener for mark, opener in _OPENERS.items() if self._head.startswith(mark)), None)
        self._source: Any = None if opener is None else opener(_Reader(self._raw))

    def _raw(self, size: int = -1) -> bytes:
        cut = len(self._head) if size < 0 else size
        data, self._head = self._head[:cut], self._head[cut:]
        data += self._stream.read(size if size < 0 else size - len(data))
        self.packed += len(data)
        return data

    def read(self, size: int = -1) -> bytes:
        """As of any stream."""
        if self._source is None:
            return self._raw(size)
        data = self._source.read(size)
        self.unpacked += len(data)
        if self.unpacked > max(_FREE, _GROWTH * self.packed):
            raise StorageError(f"{self.packed} bytes unpack to more than {_GROWTH} times as many; pictures do not")
        return data


class _Reader(io.RawIOBase):
    """What the decompressors want: a function that reads, as a file."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self._read(size)


_XZ = b"\xfd7zXZ\0"
_OPENERS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    _XZ: lzma.LZMAFile,
}
_GROWTH = 200
_FREE = 2**26  # unpacked bytes before proportions count


def read_samples(url: str) -> Iterator[dict[str, bytes]]:
    """Samples of a shard, plain or compressed: ``{suffix: content}``; members of one key follow each other.

    Of a sample come its image and what else this package reads (``cls``, ``txt``, ``json``); hidden and system files
    are no samples.

    Raises:
        OSError: not readable to its end, or damaged.
        ValueError: a key has several images, or one member twice.
    """
    with open_shard(url) as stream:
        try:
            yield from _samples(_Unpacked(stream), url)
        except (InputError, StorageError, HTTPException):
            raise
        except Exception as error:  # foreign bytes in the hands of several libraries
            raise StorageError(f"{url} is damaged: {reason(error)}") from error


def _samples(stream: _Unpacked, url: str) -> Iterator[dict[str, bytes]]:
    sample: dict[str, bytes] = {}
    last = None
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=StrictTarInfo) as tar:  # type: ignore[call-overload]
        position = -1
        for member in tar:
            if member.offset <= position or member.size < 0:
                raise StorageError(f"{url}: a header claims a negative size")
            position = member.offset
            place = record_key(member.name)
            if place is None or not member.isreg() or member.issparse():
                continue
            key, suffix = place
            if key != last and sample:
                roles(last or "", sample, url)
                yield sample
                sample = {}
            last = key
            if suffix in sample:
                raise InputError(
                    f"{url} holds {one_line(member.name)} twice; write it with unique keys, or leave it out"
                )
            if is_image(suffix) or suffix.rpartition(".")[2] in ("cls", "txt", "json"):
                content = tar.extractfile(member)
                assert content is not None
                sample[suffix] = content.read(MAX_FILE + 1)
            tar.members = []  # else it remembers them all
        check_rest(iter(partial(tar.fileobj.read, 512), b""), url)
    if sample:
        roles(last or "", sample, url)
        yield sample


def shard_order(seed: int, start: tuple[int, int], num_shards: int, consumer: int, consumers: int) -> Iterator[int]:
    """Shards of one of ``consumers``, without end: every so-manieth of one pass after the other.

    The passes are the same permutations for all consumers, so together they read each shard once a pass, and none
    runs dry however few shards there are.

    Args:
        seed: of the run.
        start: epoch and batch at which this stream begins; another start is another stream.
        num_shards: of the set.
        consumer: number of this reader.
        consumers: how many there are, over all ranks and workers.
    """
    position, last, order = consumer, -1, np.zeros(0, np.int64)
    while True:
        number, place = divmod(position, num_shards)
        if number != last:
            order, last = np.random.default_rng((_PASS, seed, *start, number)).permutation(num_shards), number
        yield int(order[place])
        position += consumers


def shuffled(items: Iterable[T], size: int, rng: np.random.Generator) -> Iterator[T]:
    """Endless ``items`` mixed through a reservoir of ``size``."""
    reservoir: list[T] = []
    for item in items:
        if len(reservoir) < size:
            reservoir.append(item)
            continue
        place = int(rng.integers(size))
        yield reservoir[place]
        reservoir[place] = item
