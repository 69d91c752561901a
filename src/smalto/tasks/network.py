"""Networks for weights that are at hand: what a config describes is compared with the tensors of its file first."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.tasks.registry import factory

TABLES = 2**28
"""Bytes of what a network computes and no file holds; the rotary table of 1024-px images takes a hundredth."""


def network_for(given: Mapping[str, Tensor], node: Any, role: str, path: Path) -> nn.Module:
    """The network of a config node from a file, without memory, for exactly the tensors that the file has for it.

    Raises:
        InputError: the node is no such network, or not one for these tensors; all names are told.
    """
    where = f"the config in {path}"
    net = shell(factory(node, role, where=where, layers=len(given)), where)
    wrong = differences(net.state_dict(), given)
    if wrong:
        raise InputError(f"{path} is not whole: {'; '.join(wrong)}")
    return net


def shell(make: Callable[[], nn.Module], where: str) -> nn.Module:
    """A network on the meta device.

    Raises:
        InputError: settings that do not go together.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            net = make()
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{where} describes no network that can be built: {reason}") from error
    tables = sum(buffer.numel() * buffer.element_size() for buffer in _computed(net))
    if tables > TABLES:
        raise InputError(f"{where} describes a network that computes tables of {tables:,} bytes; the file is damaged")
    return net


def empty(net: nn.Module) -> nn.Module:
    """A network from the meta device with memory for its weights, which are to be loaded; what it computes is there."""
    computed = bool(_computed(net))
    net.to_empty(device="cpu")
    if computed:
        net.init_weights()  # type: ignore[operator]
    return net


def _computed(net: nn.Module) -> list[Tensor]:
    stored = net.state_dict()
    return [buffer for name, buffer in net.named_buffers() if name not in stored]


def differences(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with tensors for a network: every name that is missing, unknown or of another shape."""
    wrong = [f"{name} is missing" for name in sorted(own.keys() - given.keys())]
    wrong += [f"{name} is unknown" for name in sorted(given.keys() - own.keys())]
    return wrong + [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
