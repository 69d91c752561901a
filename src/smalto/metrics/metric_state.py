"""What a torchmetrics metric has seen, as plain tensors: put aside and gone on with."""

from typing import Any

from torchmetrics import Metric


def metric_state(metric: Metric) -> dict[str, Any]:
    """States of a metric by name: tensors, or lists of tensors."""
    return {name: getattr(metric, name) for name in metric._defaults}


def load_metric_state(metric: Metric, state: dict[str, Any]) -> None:
    """Give a metric the states of another one, on its own device."""
    for name, value in state.items():
        moved = [x.to(metric.device) for x in value] if isinstance(value, list) else value.to(metric.device)
        setattr(metric, name, moved)
