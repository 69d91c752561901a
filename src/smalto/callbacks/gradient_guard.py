"""Steps that would ruin the weights are not taken: gradients that are not finite, or far beyond all others."""

import logging
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint
from smalto.errors import InputError
from smalto.tasks.optim import gradient_norm

log = logging.getLogger(__name__)

SETTLED = 100
"""Steps behind the average norm before one can be called far beyond it."""
MEMORY = 0.01
"""Share of the newest step in the average norm, once it is settled."""


class GradientGuard(L.Callback):
    """Skips optimizer steps with a bad gradient, counts them, and ends a run that takes no others.

    A skipped step leaves weights and optimizer states as they were; the learning rate and the data go on. Whether to
    skip is decided from the norm of all gradients of an optimizer, after processes have averaged them, so that all
    decide alike. With fused optimizers it is decided on the device. Others have no such switch, and a step with
    gradients of zero is none that was skipped (decay and moments go on): with them the host waits for the norm in
    every step. Logs ``train/grad_norm``, before clipping (``train/disc_grad_norm`` of a discriminator), and
    ``train/skipped_steps`` so far.

    Tasks call what it leaves in their ``gradient_watch`` between the backward pass and the clip.

    Not for ``trainer.precision=16-mixed``, whose loss scaler skips steps by itself.

    Args:
        patience: bad steps in a row that end the run; looked at every so many steps.
        spike_factor: a norm so many times the average of the good ones is bad too; None: only what is not finite.

    Raises:
        ValueError: patience below 1, a factor of 1 or less; in training: ``patience`` steps in a row were bad.
    """

    def __init__(self, *, patience: int = 20, spike_factor: float | None = 100.0) -> None:
        if patience < 1 or (spike_factor is not None and spike_factor <= 1):
            raise InputError(
                f"callbacks.gradient_guard: patience is {patience} (needs >= 1), spike_factor is {spike_factor} "
                "(needs > 1, or null)"
            )
        self.patience = patience
        self.spike_factor = spike_factor
        self._watches: list[_Watch] = []
        self._resumed: list[dict[str, float]] = []
        self._told = 0
        self._read_at = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Watch every optimizer; the task shows their gradients before it clips them."""
        self._watches = [_Watch(optimizer, self.spike_factor, pl_module.device) for optimizer in trainer.optimizers]
        for watch, state in zip(self._watches, self._resumed, strict=False):
            watch.load(state)
        self._told = sum(int(watch.skipped) for watch in self._watches)
        if trainer.precision == "16-mixed":
            self._watches = []
        pl_module.gradient_watch = partial(self._look, pl_module) if self._watches else None

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Let go of the task."""
        pl_module.gradient_watch = None

    def _look(self, pl_module: Any, optimizer: Optimizer) -> Tensor | None:
        """Judge the gradients of an optimizer, which are not yet clipped; their norm, for the clip."""
        norm = gradient_norm(optimizer)
        if norm is None:
            return None
        plain: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # Lightning's wrapper of an optimizer is another object.
        number = [watch.optimizer for watch in self._watches].index(getattr(optimizer, "optimizer", optimizer))
        self._watches[number].look(plain)
        skipped = torch.stack([w.skipped for w in self._watches]).sum()
        name = f"train/{'disc_' if number else ''}grad_norm"
        pl_module.step_log.note({name: plain, "train/skipped_steps": skipped}, mean=False)
        return norm

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Say what was skipped, and stop where nothing else happens."""
        step = trainer.global_step
        if step == self._read_at or (step % self.patience and step != trainer.max_steps):
            return
        self._read_at = step  # once, not after each batch of an accumulated step
        skipped = sum(int(watch.skipped) for watch in self._watches)
        if skipped > self._told and trainer.is_global_zero:
            log.warning(
                "step %d: %d bad gradients, their steps were skipped", trainer.global_step, skipped - self._told
            )
        self._told = skipped
        row = max((int(watch.in_a_row) for watch in self._watches), default=0)
        if row < self.patience:
            return
        folders = [c.folder for c in trainer.callbacks if isinstance(c, LatestCheckpoint)]  # type: ignore[attr-defined]
        good = newest_checkpoint(folders[0]) if folders else None
        start = (
            f"{good} holds good weights: start anew with init_from={good}" if good else "nothing was saved: start anew"
        )
        raise InputError(
            f"the gradients of the last {row} steps, up to step {trainer.global_step}, were not finite or above "
            f"{self.spike_factor} times their average; {start}, a lower task.optimizer.lr, "
            "or a higher callbacks.gradient_guard.patience or spike_factor"
        )

    def state_dict(self) -> dict[str, Any]:
        """Counts and averages of every optimizer."""
        return {"watches": [watch.state() for watch in self._watches]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`state_dict`."""
        self._resumed = state_dict["watches"]


class _Watch:
    """The norms of one optimizer's gradients, on its device; scalars there, float64 where the device has it."""

    def __init__(self, optimizer: Optimizer, spike_factor: float | None, device: torch.device) -> None:
        self.optimizer = optimizer
        self.spike_factor = spike_factor
        kind = torch.float32 if device.type == "mps" else torch.float64
        self.average, self.good, self.skipped, self.in_a_row = torch.zeros(4, dtype=kind, device=device).unbind()
        self.fused = bool(optimizer.defaults.get("fused"))

    @torch.no_grad()
    def look(self, norm: Tensor) -> None:
        """Judge the gradients by their norm, and take them away from the step if they are bad."""
        exact = norm.to(self.average.dtype)
        bad = ~exact.isfinite()
        if self.spike_factor is not None:
            bad |= (self.good >= SETTLED) & (exact > self.spike_factor * self.average)
        moved = torch.lerp(self.average, exact, (1 / (self.good + 1)).clamp_min(MEMORY))
        self.average = torch.where(bad, self.average, moved)
        self.good = self.good + ~bad
        self.skipped = self.skipped + bad
        self.in_a_row = (self.in_a_row + 1) * bad
        if self.fused:  # what the loss scaler of float16 sets, too: the kernel then changes nothing
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        elif bool(bad):
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def state(self) -> dict[str, float]:
        """Plain numbers, exact."""
        return {name: float(getattr(self, name)) for name in ("average", "good", "skipped", "in_a_row")}

    def load(self, state: dict[str, float]) -> None:
        """See :meth:`state`."""
        for name, value in state.items():
            setattr(self, name, torch.full_like(self.average, value))
