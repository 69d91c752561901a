"""Exponential moving average of ``task.net``, and only of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from smalto.errors import InputError
from smalto.tasks.contents import EMA_KEY


class EMA(L.Callback):
    """Averages parameters after every optimizer step; validation and samples use the average.

    Lightning's own averaging copies the whole module (discriminator and perceptual network too), averages integer
    buffers and cannot copy sharded models.

    Args:
        decay: of the average, per step.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at step n, so that the first steps are forgotten quickly.
    """

    def __init__(self, *, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"callbacks.ema.decay is {decay}, must be in [0, 1)")
        self.decay = decay
        self.warmup = warmup
        self.num_updates = 0
        self._last_step = 0
        self.shadow: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] | None = None

    @property
    def state_key(self) -> str:
        """Where a checkpoint keeps the average."""
        return EMA_KEY

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Start from the weights as they are, unless a checkpoint brought an average."""
        parameters = dict(pl_module.net.named_parameters())
        if not self.shadow:
            self.shadow = {name: p.detach().clone().float() for name, p in parameters.items()}
        self.shadow = {name: value.to(parameters[name].device) for name, value in self.shadow.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count steps from where the run begins."""
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Move the average once per optimizer step, not per batch of an accumulated one."""
        if trainer.global_step > self._last_step:
            self._last_step = trainer.global_step
            self.update(pl_module.net)

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """One step of the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates)) if self.warmup else self.decay
        parameters = dict(net.named_parameters())
        averages = [_local(value) for value in self.shadow.values()]
        torch._foreach_lerp_(averages, [_local(parameters[name]).float() for name in self.shadow], 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def _swap_in(self, net: nn.Module) -> None:
        if self._live is None and self.shadow:
            parameters = dict(net.named_parameters())
            self._live = {name: parameters[name].detach().clone() for name in self.shadow}
            for name, value in self.shadow.items():
                parameters[name].copy_(value)

    @torch.no_grad()
    def _swap_out(self, net: nn.Module) -> None:
        if self._live is not None:
            parameters = dict(net.named_parameters())
            for name, value in self._live.items():
                parameters[name].copy_(value)
            self._live = None

    @contextmanager
    def applied(self, net: nn.Module) -> Iterator[None]:
        """The average stands in for the weights of ``net`` inside the context; nested use changes nothing."""
        outermost = self._live is None
        self._swap_in(net)
        try:
            yield
        finally:
            if outermost:
                self._swap_out(net)

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Validate the average."""
        self._swap_in(pl_module.net)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Back to the trained weights."""
        self._swap_out(pl_module.net)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Never let a checkpoint on exception save the average as the weights."""
        if pl_module.net is not None:
            self._swap_out(pl_module.net)

    def state_dict(self) -> dict[str, Any]:
        """Average and count; a checkpoint of them resumes exactly."""
        return {"num_updates": self.num_updates, "shadow": self.shadow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self.num_updates = state_dict["num_updates"]
        self.shadow = state_dict["shadow"]


def _local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def averaged_weights(trainer: Any, net: nn.Module) -> AbstractContextManager[None]:
    """The average of the run's EMA callback applied to ``net``; nothing if the run has none."""
    for callback in trainer.callbacks:
        if isinstance(callback, EMA):
            return callback.applied(net)
    return nullcontext()
