"""Every collective that a process enters, written down: from Python, from DDP's reducer, and of sharded modules."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PROJECT, LIGHTNING = f"{os.sep}smalto{os.sep}", f"{os.sep}lightning{os.sep}"
SPACES = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
NO_COLLECTIVES = {"wait_tensor", "wrap_tensor_autograd"}


@dataclass(frozen=True)
class Call:
    """One collective."""

    kind: str
    numel: int
    bytes: int
    devices: tuple[str, ...]
    place: str
    """``file:line`` of the innermost frame of smalto, else of Lightning, else of whoever called."""
    function: str
    """Name of that frame's function."""
    backward: bool
    """Entered by autograd: a gradient."""
    phase: Any

    @property
    def essence(self) -> tuple:
        """What must be equal in all processes, in this order."""
        return self.kind, self.numel, self.bytes, self.place, self.backward, self.phase


class Recorder(TorchDispatchMode):
    """Within it, ``calls`` grows by every collective of this thread and of the backward passes it runs (on a CPU).

    At the dispatcher, so that calls from C++ are seen. Set ``phase`` to say what the run is doing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.phase: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it sends is seen when it has unwrapped itself
        if getattr(func, "namespace", None) in SPACES and func._opname.strip("_") not in NO_COLLECTIVES:
            self._write(func, (args, kwargs))
        return func(*args, **(kwargs or {}))

    def _write(self, func: Any, arguments: Any) -> None:
        # One process of these holds what all others give or get: the share of each is what must be equal.
        shares = {"gather_": 1, "scatter_": 0}
        given = arguments[0][shares[func._opname]] if func._opname in shares else arguments
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
        place, function, backward = _where()
        self.calls.append(
            Call(
                kind=func._opname.strip("_"),
                numel=sum(t.numel() for t in tensors),
                bytes=sum(t.nbytes for t in tensors),
                devices=tuple(sorted({t.device.type for t in tensors})),
                place=place,
                function=function,
                backward=backward,
                phase=self.phase,
            )
        )


def _where() -> tuple[str, str, bool]:
    frames = list(_frames())
    backward = any(f.f_code.co_name == "_engine_run_backward" for f in frames)
    for mark in (PROJECT, LIGHTNING, ""):
        for frame in frames:
            name = frame.f_code.co_filename
            if mark in name and "tests" not in name.split(os.sep)[-2:]:
                short = name.rpartition(mark)[2] if mark else name
                return f"{short}:{frame.f_lineno}", frame.f_code.co_name, backward
    raise AssertionError("no frame")


def _frames() -> Iterator[Any]:
    frame: Any = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


@contextmanager
def recorded() -> Iterator[Recorder]:
    """A :class:`Recorder` at work."""
    with Recorder() as recorder:
        yield recorder
