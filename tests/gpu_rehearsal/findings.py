"""What a run asked of the device that costs time or fails there, by kind and by the line that asked."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import smalto

SOURCES = str(Path(smalto.__file__).parent)
BESIDE = ("torch/", "gpu_rehearsal/pretend.py", "gpu_rehearsal/findings.py", "contextlib.py", "functools.py")

FETCH = "fetch"
"""The host waits for a value of the device: ``item``, ``bool``, ``tolist``, a copy to the host, a shape that depends on
values."""
SEND = "send"
"""A number or a tensor goes from ordinary memory of the host to the device, which waits for the queue of work."""
MIXED = "mixed devices"
GENERATOR = "generator of another device"
KINDS = (FETCH, SEND, MIXED, GENERATOR)


class DeviceError(RuntimeError):
    """What fails on a device: tensors, or generators, of different ones."""


def place() -> str:
    """Nearest line of smalto, ``file.py:function:line``; where only its commands are near, of who called torch."""
    frame: FrameType | None = sys._getframe(1)
    other = ""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(SOURCES):
            where = f"{name[len(SOURCES) + 1 :]}:{frame.f_code.co_name}:{frame.f_lineno}"
            return other if other and "/" not in where else where
        if not other and not any(part in name for part in BESIDE):
            other = f"{'/'.join(Path(name).parts[-2:])}:{frame.f_code.co_name}:{frame.f_lineno}"
        frame = frame.f_back
    return other or "?"


class Findings:
    """Counts by phase, kind and place.

    A phase is a word for what the run is doing: ``step`` is a training step that neither logs, saves nor validates.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.counts: Counter[tuple[str, str, str, str]] = Counter()

    @property
    def phases(self) -> set[str]:
        """Those in which something was found."""
        return {phase for phase, *_ in self.counts}

    def note(self, kind: str, what: str) -> None:
        self.counts[self.phase, kind, what, place()] += 1

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def of(self, *phases: str, kinds: tuple[str, ...] = KINDS) -> dict[str, int]:
        """``kind what at place`` to how often, in these phases."""
        found: Counter[str] = Counter()
        for (phase, kind, what, where), count in self.counts.items():
            if phase in phases and kind in kinds:
                found[f"{kind} {what} at {where}"] += count
        return dict(sorted(found.items()))
