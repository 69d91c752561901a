"""How many bytes of tensors are alive, operator by operator: with fake tensors a plan, with real ones a measurement."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make within the context, until nobody holds them any more.

    Every storage counts once, whatever views share it; tensors from before the context do not count. Scratch memory
    inside of an operator is not seen, nor is what an allocator rounds up.

    Attributes:
        live: bytes alive now, without those set aside.
        aside: bytes alive now of tensors given to :meth:`set_aside`.
        peak: largest ``live`` since the start, or since :meth:`restart`.
        peak_of_all: largest ``live + aside``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.aside = self.peak = self.peak_of_all = 0
        self._storages: dict[int, weakref.ref] = {}
        self._aside: set[int] = set()

    def restart(self) -> None:
        """Forget the peaks, not what is alive."""
        self.peak, self.peak_of_all = self.live, self.live + self.aside

    def set_aside(self, tensor: Tensor) -> None:
        """Count the storage of ``tensor`` apart from now on: gradients, when they are complete."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages and storage._cdata not in self._aside:
            self._aside.add(storage._cdata)
            self.live -= storage.nbytes()
            self.aside += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what is new in its result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        if any(storage._cdata not in self._storages for storage in made):
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            for storage in made:
                if storage._cdata not in given and storage._cdata not in self._storages:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            del self._storages[key]
            if key in self._aside:
                self._aside.remove(key)
                self.aside -= size
            else:
                self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.peak_of_all = max(self.peak_of_all, self.live + self.aside)
