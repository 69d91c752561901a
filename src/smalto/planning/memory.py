"""Memory of a training on each device, under each strategy, and what would fit."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from smalto.nn.block import TransformerBlock
from smalto.planning.device import GIB, Device
from smalto.planning.step import PRECISIONS, StepBytes, optimizer_bytes, trace_step, trained_nets, trained_parameters

STRATEGIES = ("auto", "ddp", "fsdp")
"""One device; a copy on each; weights, gradients and optimizer state cut among all."""


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Bytes on one device when a training step holds most.

    Args:
        weights: that are trained, with buffers.
        gradients: of all of them; with ``auto`` those not there at the peak are taken off ``activations``.
        optimizer: its state.
        average: of the EMA callback.
        frozen: networks that are not trained: a generator's tokenizer, the perceptual network.
        gathered: weights and gradients of the blocks at work, whole; of ``fsdp`` only.
        activations: everything that the step makes, inputs and temporary tensors too.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    frozen: int
    gathered: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(asdict(self).values())


class StepCurve:
    """Bytes of a step by batch: traced at two batches, linear between and beyond.

    The peak is a maximum over moments of something linear in the batch, so it is convex: between the two batches the
    line is an upper bound, beyond them a lower one, and exact where one moment decides all.
    """

    def __init__(self, trace: Callable[[int], StepBytes], first: int, second: int) -> None:
        self._points = {batch: trace(batch) for batch in (first, second)}

    def __call__(self, images: int) -> StepBytes:
        """At a batch of ``images``."""
        (a, at_a), (b, at_b) = sorted(self._points.items())
        return at_a.toward(at_b, (images - a) / (b - a))


class MemoryPlan:
    """Memory of a task by strategy, number of devices and batch.

    Args:
        task: built as an outline; its weights are replaced by fake ones.
        precision: ``trainer.precision``.
        global_batch: images of a step, all devices together.
        devices: for which it is planned; divides ``global_batch``.
        accumulate: steps whose gradients are summed.
        averaged: with an EMA callback.
        frozen: bytes of networks beside those of the task.
        drawing: bytes that a callback's samples take while training; None: there is none.
        gpu: by the rules of a GPU.
    """

    def __init__(
        self,
        task: Any,
        *,
        precision: str,
        global_batch: int,
        devices: int,
        accumulate: int,
        averaged: bool,
        frozen: int,
        drawing: int | None,
        gpu: bool,
    ) -> None:
        self._drawing = drawing
        self.global_batch, self._accumulate = global_batch, accumulate
        stored, products = PRECISIONS[precision]
        self._stored, self._gathered_size = stored.itemsize, (products or stored).itemsize
        trained = trained_parameters(task)
        self._trained = sum(p.numel() for p in trained)
        buffers = sum(_bytes(net.buffers()) for net in trained_nets(task))
        constant = sum(p.numel() for net in trained_nets(task) for p in net.parameters() if not p.requires_grad)
        self._weights = self._stored * (self._trained + constant) + buffers
        self._optimizer = optimizer_bytes(task, precision=precision)
        self._average = 4 * sum(p.numel() for p in task.net.parameters()) if averaged else 0
        perceptual = getattr(task, "perceptual", None)
        self._carried = frozen
        self._frozen = frozen + (0 if perceptual is None else _bytes(perceptual.parameters()))
        blocks = [sum(p.numel() for p in m.parameters()) for m in task.net.modules() if isinstance(m, TransformerBlock)]
        self._block, self._root = max(blocks, default=0), self._trained - sum(blocks)
        each = global_batch // devices
        second = global_batch if devices > 1 else max(1, each // 2) if each > 1 else 2

        def curve(cast_weights: bool) -> StepCurve:
            return StepCurve(
                lambda images: trace_step(task, images=images, precision=precision, gpu=gpu, cast_weights=cast_weights),
                each,
                second,
            )

        self._copied = curve(False)
        self._sharded = self._copied if products is None else curve(True)

    @property
    def checkpoint_bytes(self) -> int:
        """Of everything that a run needs to go on, and the tokenizer that samples need."""
        return self._weights + self._optimizer + self._average + self._carried

    def at(self, strategy: str, *, devices: int, images: int) -> DeviceMemory:
        """On each of ``devices``, with ``images`` on each."""
        shards = devices if strategy == "fsdp" else 1
        gradients = self._stored * self._trained
        step = (self._sharded if strategy == "fsdp" else self._copied)(images)
        activations = step.without_gradients
        if strategy == "auto" and self._accumulate == 1:
            activations = step.with_gradients(gradients) - gradients
        return DeviceMemory(
            weights=-(-self._weights // shards),
            gradients=-(-gradients // shards),
            optimizer=-(-self._optimizer // shards),
            average=-(-self._average // shards),
            frozen=self._frozen,
            gathered=self._gathered() if shards > 1 else 0,
            activations=activations,
        )

    def while_sampling(self, strategy: str, *, devices: int) -> int | None:
        """Bytes on each of ``devices`` while a callback draws samples; None: none does.

        Gradients of the last step are still there; the average takes the place of the weights, which are kept aside.
        """
        if self._drawing is None:
            return None
        state = self.at(strategy, devices=devices, images=1)
        kept = state.weights if state.average else 0
        return state.total - state.activations - state.gathered + kept + self._drawing

    def _gathered(self) -> int:
        """Of FSDP2: everything outside of blocks from start to end, and its gradients until the end of the pass; the
        block at work and the next one, one of them twice while it is copied; gradients of a block before and, in the
        precision of the weights, during the reduction, with that of the block before still on its way. Gradients that
        are added up over several batches stay whole.
        """
        whole = self._stored * self._trained if self._accumulate > 1 else 0
        return whole + self._gathered_size * (2 * self._root + 4 * self._block) + 2 * self._stored * self._block

    def peak(self, strategy: str, *, devices: int, images: int) -> int:
        """Bytes on each of ``devices``, training or drawing."""
        step = self.at(strategy, devices=devices, images=images).total
        return max(step, self.while_sampling(strategy, devices=devices) or 0)

    def smallest(self, strategy: str, usable: float) -> int | None:
        """Smallest power of two of devices, 4096 at most, on which the global batch fits ``usable`` bytes, or None."""
        counts = [2**n for n in range(13) if self.global_batch % 2**n == 0]
        for devices in counts[:1] if strategy == "auto" else counts:
            if self.peak(strategy, devices=devices, images=self.global_batch // devices) <= usable:
                return devices
        return None

    def largest_batch(self, strategy: str, *, devices: int, usable: float) -> int:
        """Most images on each of ``devices`` within ``usable`` bytes; 0 if not even one fits."""
        low, high = 0, 1
        while self.peak(strategy, devices=devices, images=high) <= usable and high < 2**20:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            if self.peak(strategy, devices=devices, images=middle) <= usable:
                low = middle
            else:
                high = middle
        return low


def usable_bytes(device: Device, headroom: float) -> float:
    """Of a device, what tensors may take."""
    return device.memory_gib * GIB * (1 - headroom)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.itemsize for t in tensors if isinstance(t, torch.Tensor))


def parameters_by_part(task: Any) -> dict[str, int]:
    """Trained parameters of the parts of every network; buffers and frozen networks are not counted."""
    counts = {}
    for net in trained_nets(task):
        kind = "discriminator" if net is not task.net else ""
        for name, part in [("", net)] if kind else net.named_children():
            number = _trained(part)
            if number:
                counts[kind or PART_NAMES.get(name, name)] = number
    return counts


PART_NAMES = {"token_embedding": "embedding of codes", "output": "head", "norm": "last norm", "quantizer": "codebook"}


def _trained(part: nn.Module) -> int:
    return sum(p.numel() for p in part.parameters() if p.requires_grad)
