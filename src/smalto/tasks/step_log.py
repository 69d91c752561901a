"""Numbers of training steps: they stay on the device until a step is logged, then all come in one piece."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor


class StepLog(L.Callback):
    """Keeps the newest value under each name; hands them to Lightning at the steps that Lightning logs.

    ``self.log(..., sync_dist=True)`` meets all processes twice per value in every step, whatever
    ``trainer.log_every_n_steps`` says, and copies Python numbers to the device. Here a step costs nothing. At a logging
    step, and at the last one, the values of the step are stacked, averaged over processes by one reduction, fetched
    once, and logged: ``trainer.callback_metrics`` and loggers have them from then on, on the CPU.

    It stands behind all callbacks that note something or end the run, before those that save.
    """

    def __init__(self) -> None:
        self._mean: dict[str, Tensor] = {}
        self._own: dict[str, Tensor | float] = {}

    def note(self, values: Mapping[str, Tensor | float], *, mean: bool = True) -> None:
        """Take values of the running step, the same names in every process.

        Args:
            values: scalars; tensors stay where they are, Python numbers never go to the device.
            mean: over processes; False for what is equal in all of them. Python numbers are taken for that.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                (self._mean if mean else self._own)[name] = value.detach()
            else:
                self._own[name] = value

    def read(self) -> dict[str, Tensor]:
        """The newest values by name, scalars on the CPU; waits for the device. All processes must call it together."""
        names, tensors = list(self._mean), list(self._mean.values())
        if tensors and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            names.sort()
            stacked = _stacked([self._mean[name] for name in names])
            dist.all_reduce(stacked)  # not AVG, which gloo lacks
            tensors = list((stacked / dist.get_world_size()).unbind())
        own = {name: value for name, value in self._own.items() if isinstance(value, Tensor)}
        names, tensors = names + list(own), tensors + list(own.values())
        fetched = _stacked(tensors).cpu().unbind() if tensors else []
        found = {n: value.to(_kind(t)) for n, t, value in zip(names, tensors, fetched, strict=True)}
        numbers = {name: torch.tensor(v, dtype=torch.float32) for name, v in self._own.items() if name not in own}
        return found | numbers

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Log, if Lightning is about to write this step's row, or if there will be no other."""
        connector, loop = trainer._logger_connector, trainer.fit_loop
        between = loop._should_accumulate() and pl_module.automatic_optimization
        if not between and (connector.should_update_logs or is_last_step(trainer)):
            pl_module.log_dict(self.read())


class LoggedModule(L.LightningModule):
    """A task whose steps note what they measure in ``step_log``."""

    def __init__(self) -> None:
        super().__init__()
        self.step_log = StepLog()

    def configure_callbacks(self) -> list[L.Callback]:
        """What logs the steps; a later call of the same trainer has it already."""
        return [] if self.step_log in self.trainer.callbacks else [self.step_log]  # type: ignore[attr-defined]


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether training ends with the step that was just made."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (last_epoch and trainer.is_last_batch)


def _kind(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def _stacked(values: list[Tensor]) -> Tensor:
    """In the widest kind among them, which holds all of them exactly."""
    kind = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return torch.stack([value.to(kind) for value in values])
