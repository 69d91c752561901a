"""A task whose networks have shapes and no values: built on the meta device, then given fake weights to run with."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smalto.losses.perceptual import PerceptualLoss
from smalto.tasks.gpt import GPTTask


class PerceptualOutline(PerceptualLoss):
    """The perceptual loss with the layers of its network and without their weights; ``auto`` is VGG16.

    The network is a submodule here, so that it is found like any other; it has no values that could be saved.
    """

    def __init__(self, *, net: str = "auto", weights: str | Path | None = None, dropout: float = 0.0) -> None:
        super().__init__(net="vgg" if net == "auto" else net, weights=None, dropout=dropout)
        self.network = self._constant[0]

    def load_network(self, net: str, path: Path) -> nn.Module:
        """The layers alone, on the meta device."""
        with torch.device("meta"):
            return self.layers(net).to("meta")


def build_outline(task: Any) -> None:
    """Build the networks of ``task`` on the meta device: shapes, parameters, no memory."""
    with torch.device("meta"):
        if isinstance(task, GPTTask):  # its own way fills the weights, and loads the tokenizer
            task.net = task.net_factory()
            task.net.recompute_every = task.recompute_every
        else:
            task.configure_model()


def fake_weights(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> None:
    """Replace all parameters and buffers of ``module`` by fake ones on the CPU, of the same shapes and strides.

    Args:
        module: on the meta device, or with fake weights of ``mode``.
        mode: in which it will run.
        dtype: of all floating-point ones; None keeps theirs.
    """
    with mode:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    wanted = dtype if dtype is not None and old.is_floating_point() else old.dtype
                    new = torch.empty_strided(old.shape, old.stride(), dtype=wanted, device="cpu")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    tensors[name] = new  # type: ignore[assignment]
