"""What a torchmetrics metric has seen, as plain tensors: put aside and gone on with."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor
from torchmetrics import Metric


class CarriesTensors(Metric):
    """A metric with tensors that are no states, because states are added over processes; they move along with it."""

    carried: tuple[str, ...] = ()
    """Names of attributes that hold them: tensors, or frozen dataclasses with tensors inside; None is nothing."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        moved = super()._apply(fn, *args, **kwargs)
        for name in self.carried:
            setattr(moved, name, mapped(getattr(moved, name, None), fn))
        return moved


def mapped(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``fn`` of every tensor in it; the same object where nothing changes."""
    if isinstance(value, Tensor):
        return fn(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    old = {field.name: getattr(value, field.name) for field in fields(value)}
    new = {name: mapped(part, fn) for name, part in old.items()}
    return replace(value, **new) if any(new[name] is not old[name] for name in old) else value


def metric_state(metric: Metric) -> dict[str, Any]:
    """States of a metric by name: tensors, or lists of tensors."""
    return {name: getattr(metric, name) for name in metric._defaults}


def load_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Give a metric the states of another one, on its own device."""
    for name, value in state.items():
        moved = [x.to(metric.device) for x in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
