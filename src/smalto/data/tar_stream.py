"""Samples out of tar shards as they come: local files, web addresses, output of commands."""

import subprocess
import tarfile
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from smalto.data.patterns import expand_braces, expand_paths
from smalto.data.shards import split_key
from smalto.errors import InputError, StorageError

T = TypeVar("T")

_BLOCK = 512  # tar's unit
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


class _Tail:
    """A stream that remembers how it began and ended: tarfile takes one cut between members for a whole one."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._head = self._tail = b""

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._head = self._head or data[:_BLOCK]
        self._tail = (self._tail + data)[-_BLOCK:]
        return data

    def is_cut(self) -> bool:
        """Whether this is a plain tar without its end mark; compressed ones notice themselves."""
        return self._head[257:262] == b"ustar" and self._tail.strip(b"\0") != b""


def read_samples(url: str) -> Iterator[dict[str, bytes]]:
    """Samples of a shard, plain or compressed: ``{suffix: content}``; members of one key follow each other.

    Raises:
        OSError: not readable to its end.
        tarfile.TarError: damaged.
    """
    with open_shard(url) as stream:
        yield from _samples(_Tail(stream), url)


def _samples(stream: _Tail, url: str) -> Iterator[dict[str, bytes]]:
    sample: dict[str, bytes] = {}
    last = None
    with tarfile.open(fileobj=stream, mode="r|*") as tar:  # type: ignore[call-overload]
        for member in tar:
            if not member.isfile():
                continue
            key, suffix = split_key(member.name)
            if key != last and sample:
                yield sample
                sample = {}
            last = key
            content = tar.extractfile(member)
            assert content is not None
            sample[suffix] = content.read()
    if stream.is_cut():
        raise StorageError(f"{url} ends without tar's end mark")
    if sample:
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
