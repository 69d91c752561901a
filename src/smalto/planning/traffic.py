"""What a training step sends: over the network for gradients and weights, between host and device for data and logs."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from smalto.nn.block import TransformerBlock
from smalto.planning.device import Device
from smalto.planning.step import PRECISIONS, trained_nets, trained_parameters

Traffic = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class StepTraffic:
    """Bytes that each device sends in an optimizer step, and receives as many; by rings, as NCCL and gloo do.

    Among n devices a ring sends (n - 1) / n of a tensor that is gathered or of one that is reduced and scattered, and
    both for one that is all-reduced. Sums of a few numbers (logs, norms of gradients, statistics of a global batch) are
    not counted.

    Args:
        weights: gathered; of ``fsdp`` only.
        gradients: reduced. Of a tokenizer those of both networks, each in its own backward pass.
        buffers: copied from the first device; of ``ddp`` with ``broadcast_buffers`` only.
    """

    weights: int = 0
    gradients: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


def ddp_traffic(task: Any, *, devices: int, precision: str, buffers: int = 0) -> StepTraffic:
    """Of copies on all ``devices``: gradients once a step, in the dtype of the weights, however many batches they sum.

    Args:
        task: built as an outline.
        devices: number of them.
        precision: ``trainer.precision``.
        buffers: bytes that DDP copies to all devices before a step's forward pass; 0 with ``broadcast_buffers=false``.
    """
    if devices == 1:
        return StepTraffic()
    gradients = PRECISIONS[precision][0].itemsize * sum(p.numel() for p in trained_parameters(task))
    return StepTraffic(gradients=2 * gradients * (devices - 1) // devices, buffers=buffers)


def fsdp_traffic(task: Any, *, devices: int, precision: str, accumulate: int, reduce_once: bool) -> StepTraffic:
    """Of shares: weights gathered for each forward and again for each backward pass, gradients reduced and scattered.

    With ``bf16-mixed`` weights travel in bfloat16, gradients in float32. Shares are padded to the same size on all.

    Args:
        task: built as an outline.
        devices: number of them.
        precision: ``trainer.precision``.
        accumulate: batches of a step.
        reduce_once: see :class:`smalto.tasks.strategy.ShardedStrategy`.
    """
    if devices == 1:
        return StepTraffic()
    stored = PRECISIONS[precision][0].itemsize
    gathered = 2 if precision == "bf16-mixed" else stored
    blocks = {id(p) for m in task.net.modules() if isinstance(m, TransformerBlock) for p in m.parameters()}
    weights = gradients = 0
    for parameter in task.net.parameters():
        share = -(-parameter.shape[0] // devices) * math.prod(parameter.shape[1:])
        weights += share * (GATHERS_OF_BLOCKS if id(parameter) in blocks else GATHERS_OF_ROOT)
        gradients += share * parameter.requires_grad
    others = devices - 1
    return StepTraffic(
        weights=gathered * weights * accumulate * others,
        gradients=stored * gradients * (1 if reduce_once else accumulate) * others,
    )


GATHERS_OF_BLOCKS = 2
"""A block is dropped after its forward pass, and there again for its backward pass."""
GATHERS_OF_ROOT = 1
"""Embeddings, last norm and output layer stay between the two (``shard_blocks`` in :mod:`smalto.tasks.parallel`)."""


def logged_numbers(task: Any) -> int:
    """Of all processes: losses that a training step logs, once there is a discriminator."""
    if not hasattr(task, "disc_start"):
        return 1
    adversarial = 0 if task.discriminator is None else 4 + bool(task.adaptive_disc_weight)
    return 4 + (task.perceptual is not None) + (task.net.quantizer.entropy_weight > 0) + adversarial


def batch_bytes(task: Any, images: int) -> int:
    """Of ``images`` as they are copied to a device: pixels of a byte, int64 codes and labels, float32 text features."""
    net = task.net
    if not hasattr(net, "num_codes"):
        return images * 3 * net.image_size**2
    text = getattr(net.conditioner, "text_dim", None)
    condition = 8 if text is None else net.conditioner.num_tokens * (4 * text + 1)
    return images * (8 * net.num_codes + condition)


def plan_traffic(
    task: Any,
    device: Device,
    trainer: dict[str, Any],
    *,
    kind: str,
    strategy: str,
    precision: str,
    devices: int,
    batch_size: int,
    frozen: Iterable[nn.Module],
    network_gb_s: float | None,
    seconds_per_step: float,
) -> Traffic:
    """Bytes of a step by strategy, and how long they take if a link is the only thing that limits them.

    Args:
        task: built as an outline.
        device: whose link counts.
        trainer: the resolved node of the config.
        kind: ``gpt`` or ``tokenizer``.
        strategy: the config's.
        precision: ``trainer.precision``.
        devices: on all nodes.
        batch_size: images of a batch of all devices together.
        frozen: networks that the task carries along, whose buffers are copied with its own.
        network_gb_s: of a node, all its network cards together, one way; None: not known.
        seconds_per_step: of the arithmetic, to compare with.
    """
    node = trainer["strategy"] if isinstance(trainer["strategy"], dict) else {}
    accumulate, nodes = trainer["accumulate_grad_batches"], trainer["num_nodes"]
    copied = 0
    if strategy == "ddp" and node.get("broadcast_buffers", True):
        copied = sum(b.nbytes for net in (*trained_nets(task), *frozen) for b in net.buffers())
    found = {"ddp": ddp_traffic(task, devices=devices, precision=precision, buffers=copied)}
    if kind == "gpt":
        found["fsdp"] = fsdp_traffic(
            task,
            devices=devices,
            precision=precision,
            accumulate=accumulate,
            reduce_once=node.get("reduce_once", True),
        )
    speed = _slowest_link(device, devices, nodes, network_gb_s)

    def row(traffic: StepTraffic) -> Traffic:
        seconds = None if speed is None else traffic.total / (speed * 1e9)
        share = None if seconds is None else seconds / seconds_per_step
        return {**asdict(traffic), "total": traffic.total, "seconds": seconds, "share_of_step": share}

    return {
        "strategies": {name: row(traffic) for name, traffic in found.items()},
        "gb_s": speed,
        "host": {
            "batch_bytes": batch_bytes(task, batch_size // devices * accumulate),
            "log_every_n_steps": trainer["log_every_n_steps"],
            "logged_numbers": logged_numbers(task),
        },
    }


def _slowest_link(device: Device, devices: int, nodes: int, network: float | None) -> float | None:
    """GB/s of the slowest link of a ring; None if one is not known. What leaves a node is what each device sends."""
    links = ([device.link_gb_s] if devices > nodes else []) + ([network] if nodes > 1 else [])
    known = [link for link in links if link is not None]
    return min(known) if known and len(known) == len(links) else None
