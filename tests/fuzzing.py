"""Damaged and hostile inputs for readers, and what a reader must do with them.

for data in mutations(good, count=300, seed=0):
    path.write_bytes(data)
    survives(read, path)
"""

import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TypeVar

from smalto.errors import UserError

Given = TypeVar("Given")

SECONDS = 2.0
"""Of processor time that a reader may take; others use this machine too, so the clock on the wall says little."""
PATIENCE = 30
"""Seconds on the wall until a reader that waits for something is said to hang."""
MEMORY = 2**30
"""Bytes that a reader may add to the process."""
NUMBERS = (b"\x00", b"\xff", b"\x7f", b"\x80", b"9")
"""What numbers are blown up with: the ends of the ranges, in binary and as digits."""


def mutations(data: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """Variants of a good input: flipped bytes, cuts, splices, repeats and blown-up numbers; the same for one seed."""
    chance = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(chance.choice((1, 1, 1, 2, 4, 16))):
            chance.choice((_flip, _flip, _set, _cut, _drop, _splice, _repeat, _blow_up, _blow_up))(changed, chance)
        yield bytes(changed)


def _span(data: bytearray, chance: random.Random, longest: int) -> slice:
    start = chance.randrange(len(data) + 1)
    return slice(start, min(len(data), start + chance.randint(1, longest)))


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _set(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.randrange(256)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _drop(data: bytearray, chance: random.Random) -> None:
    del data[_span(data, chance, 64)]


def _splice(data: bytearray, chance: random.Random) -> None:
    piece = data[_span(data, chance, 256)]
    data[_span(data, chance, 256)] = piece


def _repeat(data: bytearray, chance: random.Random) -> None:
    piece = data[_span(data, chance, 32)]
    place = chance.randrange(len(data) + 1)
    data[place:place] = piece * chance.choice((2, 16, 1000))


def _blow_up(data: bytearray, chance: random.Random) -> None:
    """A number where one is: digits become many, bytes become the ends of a range."""
    digits = [place for place, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if digits and chance.random() < 0.5:
        place = chance.choice(digits)
        data[place : place + 1] = chance.choice(
            (b"-1", b"99999999999999999999", b"1e308", b"4294967296", b"1000000000")
        )
    else:
        place = _span(data, chance, 8)
        data[place] = chance.choice(NUMBERS) * (place.stop - place.start)


class Hangs(BaseException):
    """Not caught by readers."""


def survives(
    read: Callable[[Given], object], given: Given, *, allowed: tuple[type[Exception], ...] = (UserError,)
) -> UserError | Exception | None:
    """Read something, which may be refused in one line, but neither break nor hang nor take the machine's memory.

    Args:
        read: the reader; it must read all that it would ever read (exhaust its iterators).
        given: to it: a path, or bytes.
        allowed: what it may raise.

    Returns:
        How it was refused, None if it was read.
    """

    def hangs(number: int, frame: FrameType | None) -> None:
        raise Hangs(f"{PATIENCE} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, limits[1]))
    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    began = time.process_time()
    refused: Exception | None = None
    try:
        read(given)
    except allowed as error:
        refused = error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    took = time.process_time() - began
    assert took < SECONDS, f"{took:.1f} s for {_named(given)}"
    # A reader that takes failing allocations for damage would have taken the memory where there was some.
    cause: BaseException | None = refused
    while cause is not None:
        assert not isinstance(cause, MemoryError), f"over {MEMORY} bytes for {_named(given)}"
        assert "allocate memory" not in str(cause), f"over {MEMORY} bytes for {_named(given)}"
        cause = cause.__cause__ or cause.__context__
    if refused is not None:
        assert str(refused).strip(), f"no message for {_named(given)}"
        assert len(str(refused).splitlines()) == 1, f"more than one line: {refused}"
    return refused


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _named(given: object) -> str:
    return str(given)[:200] if not isinstance(given, bytes) else f"{len(given)} bytes: {given[:60]!r}"
