"""Sharded modules made whole for a while: for work outside of their forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

M = TypeVar("M", bound=nn.Module)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it the parameters that a sharded module itself gathers are plain tensors; other modules do not change.

    Not those of modules inside it that are sharded by themselves. All processes must enter it, in the same order.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()  # or the next forward pass would take these values for the current ones


def one_by_one(modules: Iterable[M]) -> Iterator[M]:
    """Each module, whole until the next one is asked for: memory for one of them."""
    for module in modules:
        with whole(module):
            yield module


def kept(weight: Tensor, module: nn.Module) -> Tensor:
    """A weight of a module to be used after :func:`whole`: a copy if the module is sharded, whose own is freed then."""
    return weight.detach().clone() if isinstance(module, FSDPModule) else weight
