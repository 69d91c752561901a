"""Memory format of pictures and of networks with group normalisation, by device."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

LAYOUTS: dict[str, torch.memory_format] = {"cuda": torch.contiguous_format}
"""Of devices, by type, that are not best served with channels last; may be changed, to measure the other one.

Channels last makes convolutions a fifth faster on CPUs. On CUDA ``native_group_norm`` copies its input into contiguous
memory first, so every convolution behind it would have to copy it back.
"""


def image_layout(device: torch.device) -> torch.memory_format:
    """In which memory format pictures and convolutions are fast there."""
    return LAYOUTS.get(device.type, torch.channels_last)


def lay_out(net: Any) -> Any:
    """Bring the convolutions of a network into the format of the device on which they are."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    return net.to(memory_format=image_layout(device))


class LaidOut(nn.Module):
    """A network that takes on the format of every device that it is moved to, by whomever."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = next(self.parameters()).device
        super()._apply(fn, recurse)
        if next(self.parameters()).device != before:
            lay_out(self)
        return self
