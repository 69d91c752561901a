"""A training config to a plan: parameters, arithmetic, memory, time. Plain values, for a table and for JSON."""

from dataclasses import asdict
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smalto.analysis.scaling import GPTShape
from smalto.nn.flops import forward_flops
from smalto.planning.device import Device
from smalto.planning.memory import STRATEGIES, MemoryPlan, parameters_by_part, usable_bytes
from smalto.planning.outline import fake_weights
from smalto.planning.schedule import MFU, Schedule

Plan = dict[str, Any]


def plan_flops(task: Any, kind: str) -> Plan:
    """FLOPs per image, a multiply-add as two; ``training`` without and ``hardware`` with what is computed twice.

    ``six_n`` is the rule of thumb for transformers; a convolution uses a weight at every pixel, so it has none.

    Args:
        task: built as an outline, on the meta device.
        kind: ``gpt`` or ``tokenizer``.
    """
    if kind == "gpt":
        shape, blocks = GPTShape.of(task.net), len(task.net.blocks)
        again = len(range(0, blocks, task.recompute_every)) if task.recompute_every else 0
        block = 2 * shape.positions * shape.block_weights + 4 * shape.positions**2 * shape.dim
        return {
            "forward": shape.forward_flops,
            "training": shape.training_flops,
            "hardware": shape.training_flops + again * block,
            "six_n": shape.six_n_flops,
            "sampling": shape.sampling_flops(guided=False),
            "sampling_guided": shape.sampling_flops(guided=True),
        }
    mode, net = FakeTensorMode(), task.net
    fake_weights(task, mode)
    with mode:
        image = net.encoder.conv_in.weight.new_empty(1, 3, net.image_size, net.image_size)
        rows, columns = net.code_shape[0]
        latent = image.new_empty(1, net.quantizer.codebook_dim, rows, columns)
        decode = forward_flops(_Decoding(net), latent)
        forward = forward_flops(net, image)
        before, after = task.flops(adversarial=False), task.flops(adversarial=True)
    return {
        "forward": forward,
        "encode": forward - decode,
        "decode": decode,
        "training": before,
        "training_adversarial": after,
    }


class _Decoding(nn.Module):
    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent: Any) -> Any:
        return self.net.decode_latent(latent)


def plan_parameters(task: Any, frozen: dict[str, nn.Module]) -> Plan:
    """Counts by part of what is trained, and of networks that are only used."""
    parts = parameters_by_part(task)
    perceptual = getattr(task, "perceptual", None)
    others = frozen | ({} if perceptual is None else {"perceptual": perceptual})
    return {
        "parts": parts,
        "model": sum(count for name, count in parts.items() if name != "discriminator"),
        "trained": sum(parts.values()),
        "frozen": {name: sum(p.numel() for p in net.parameters()) for name, net in others.items()},
    }


def plan_memory(memory: MemoryPlan, device: Device, *, kind: str, devices: int, headroom: float) -> Plan:
    """Of each strategy at the global batch of the config: bytes, whether they fit, what would fit."""
    usable, rows = usable_bytes(device, headroom), {}
    for strategy in STRATEGIES if kind == "gpt" else ("auto", "ddp"):
        count = 1 if strategy == "auto" else devices
        images = memory.global_batch // count
        need = memory.at(strategy, devices=count, images=images)
        rows[strategy] = {
            "devices": count,
            "images_per_device": images,
            **asdict(need),
            "total": need.total,
            "while_sampling": memory.while_sampling(strategy, devices=count),
            "fits": memory.peak(strategy, devices=count, images=images) <= usable,
            "smallest_devices": memory.smallest(strategy, usable),
            "largest_images_per_device": memory.largest_batch(strategy, devices=count, usable=usable),
        }
    return {"usable": int(usable), "strategies": rows}


def plan_time(
    flops: Plan,
    schedule: Schedule,
    device: Device,
    *,
    kind: str,
    precision: str,
    devices: int,
    mfu: float | None,
    disc_start: int | None,
    price_per_hour: float | None,
) -> Plan:
    """Seconds if all devices do the arithmetic at ``mfu`` of their peak; validation and pictures come on top."""
    share = MFU[kind] if mfu is None else mfu
    rate = devices * share * device.peak_flops(precision)
    late: float = flops.get("training_adversarial", 0.0) if disc_start is not None else 0.0
    usual: float = late or flops.get("hardware") or flops["training"]

    def seconds(steps: float, each: float) -> float:
        return steps * schedule.images_per_step * each / rate

    total = None
    if schedule.steps is not None:
        early = min(schedule.steps, disc_start or 0) if late else 0
        total = seconds(early, flops["training"]) + seconds(schedule.steps - early, usual)
    hours = None if total is None else total / 3600 * devices
    return {
        "mfu": share,
        "images_per_second": rate / usual,
        "seconds_per_step": seconds(1, usual),
        "seconds_per_epoch": seconds(schedule.steps_per_epoch, usual),
        "seconds": total,
        "device_hours": hours,
        "cost": None if hours is None or price_per_hour is None else hours * price_per_hour,
        **asdict(schedule),
        "epochs": schedule.epochs,
        "tokens": schedule.tokens,
    }
