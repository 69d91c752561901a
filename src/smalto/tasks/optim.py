"""Optimizer groups and learning-rate schedules, the same for every task and strategy."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from smalto.errors import InputError

log = logging.getLogger(__name__)

FUSED_DEVICES = {"cuda", "cpu", "mps", "xpu", "hpu", "mtia"}
"""For which torch has optimizers in one kernel; on others ``fused=True`` would fail at the first step."""

DECAYED_LAYERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


def parameter_groups(net: nn.Module) -> list[dict]:
    """Two groups: weights of linear, embedding and convolution layers decay, everything else does not.

    Decided by the type of the owning layer, not by ``p.dim()``: sharded parameters may be flat, and a rule by shape
    would then silently decay nothing.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                is_weight = isinstance(module, DECAYED_LAYERS) and name == "weight"
                (decayed if is_weight else free).append(parameter)
    return [{"params": decayed}, {"params": free, "weight_decay": 0.0}]


def build_optimizer(factory: Callable[[Iterable], Optimizer], net: nn.Module) -> Optimizer:
    """Call a partial optimizer with the groups of ``net``; without its ``fused`` kernel where the device has none."""
    groups = [group for group in parameter_groups(net) if group["params"]]
    devices = {p.device.type for group in groups for p in group["params"]}
    if isinstance(factory, partial) and factory.keywords.get("fused") and not devices <= FUSED_DEVICES:
        log.warning("no fused optimizer on %s: using the plain one, same numbers, more time", ", ".join(devices))
        factory = partial(factory, fused=False)
    return factory(groups)


def gradient_norm(optimizer: Optimizer) -> Tensor | None:
    """Global L2 norm of an optimizer's gradients, a scalar on their device; None where there are none.

    Of sharded gradients over all shards, known to every process: a DTensor, as :func:`clip_gradients` needs it.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return None
    norm = nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.redistribute(placements=[Replicate()] * norm.device_mesh.ndim)
    return norm


def clip_gradients(
    optimizer: Optimizer, max_norm: float, *, norm: Tensor | None = None, loss_scale: Tensor | None = None
) -> None:
    """Scale the gradients of an optimizer down to a global norm of ``max_norm``; of sharded ones over all shards.

    Lightning's own clipping refuses fused optimizers under every mixed precision: those of float16 carry a loss scale
    into the step, which is only taken off there.

    Args:
        optimizer: of the parameters.
        max_norm: after it.
        loss_scale: scalar on their device that all gradients are multiplied with; None: they are not.
        norm: what :func:`gradient_norm` says of these gradients, if it was asked already.
    """
    norm = gradient_norm(optimizer) if norm is None else norm
    if norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm if loss_scale is None else norm / loss_scale)


@dataclass(frozen=True)
class Schedule:
    """Factor of the learning rate as a pure function of the optimizer step, so resuming needs the step only.

    Args:
        kind: ``constant`` (the paper's) or ``cosine``.
        warmup_steps: linear rise from 1 / warmup_steps to 1.
        total_steps: where the cosine ends; must be given for it.
        final_factor: the cosine's last value.
    """

    kind: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "cosine"):
            raise InputError(f"task.schedule.kind is {self.kind!r}, must be 'constant' or 'cosine'")
        if self.warmup_steps < 0 or not 0 <= self.final_factor <= 1:
            raise InputError(
                f"task.schedule: warmup_steps is {self.warmup_steps} (needs >= 0), final_factor is "
                f"{self.final_factor} (needs 0 to 1)"
            )
        if self.kind == "cosine" and (self.total_steps is None or self.total_steps < 1):
            raise InputError(
                f"task.schedule: a cosine needs to know its end, total_steps is {self.total_steps}; "
                "set trainer.max_steps or task.schedule.total_steps"
            )

    def factor(self, step: int) -> float:
        """The factor at optimizer step ``step`` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant" or self.total_steps is None:
            return 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        return self.final_factor + (1 - self.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """A torch scheduler that applies :meth:`factor`."""
        return LambdaLR(optimizer, partial(Schedule.factor, self))
