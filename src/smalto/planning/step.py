"""What one training step of a task holds in memory: its own code, run on fake tensors."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from smalto.data.transforms import to_float
from smalto.nn.live_memory import LiveBytes
from smalto.planning.gpu_rules import gpu_rules
from smalto.planning.outline import fake_weights
from smalto.tasks.gpt import GPTTask
from smalto.tasks.tokenizer import TokenizerTask

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
}
"""Of the weights, and of matrix products where autocast changes them."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step beside weights, optimizer state and averages, at their largest.

    Args:
        forward: until the loss is there, gradients not counted.
        backward: from then on, gradients that are complete not counted: they are sharded, or in buckets that are always
            there.
        backward_and_gradients: the same, counted as they arise.
    """

    forward: int
    backward: int
    backward_and_gradients: int

    @property
    def without_gradients(self) -> int:
        """Of the whole step."""
        return max(self.forward, self.backward)

    def with_gradients(self, gradients: int) -> int:
        """Of the whole step; the last one's, ``gradients`` bytes, are there until the loss is: as Lightning does."""
        return max(self.forward + gradients, self.backward_and_gradients)

    def toward(self, other: "StepBytes", share: float) -> "StepBytes":
        """On the line through both, ``share`` of the way; never below zero."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return StepBytes(*(max(0, round(a + share * (b - a))) for a, b in pairs))


def trained_nets(task: Any) -> list[nn.Module]:
    """Networks that have an optimizer."""
    return [net for net in (task.net, getattr(task, "discriminator", None)) if net is not None]


def trained_parameters(task: Any) -> list[nn.Parameter]:
    """Of :func:`trained_nets`."""
    return [p for net in trained_nets(task) for p in net.parameters() if p.requires_grad]


def trace_step(task: Any, *, images: int, precision: str, gpu: bool, cast_weights: bool = False) -> StepBytes:
    """Forward and backward pass of ``images`` images on one device, every operator of it, without computing.

    Of a transformer a few blocks are traced: at the end of either pass's peak every further block (with
    ``recompute_every``, every further group of blocks) has left the same, so what the others add is known to the byte.

    Args:
        task: built by :func:`smalto.planning.outline.build_outline`; gets new fake weights.
        images: batch of the device.
        precision: ``trainer.precision``, a key of ``PRECISIONS``.
        gpu: by the rules of a GPU, see :func:`gpu_rules`.
        cast_weights: the weights are there in the precision of the products, as FSDP gathers them; else autocast
            keeps a copy of each until its gradient is made.
    """
    settings: Any = {"images": images, "precision": precision, "gpu": gpu, "cast_weights": cast_weights}
    blocks, group = getattr(task.net, "blocks", ()), getattr(task, "recompute_every", 0) or 1
    few = len(blocks) % group + 2 * group
    if len(blocks) <= few + group:
        return _trace(task, **settings)
    try:
        task.net.blocks = blocks[:few]
        short = _trace(task, **settings)
        task.net.blocks = blocks[: few + group]
        return short.toward(_trace(task, **settings), (len(blocks) - few) / group)
    finally:
        task.net.blocks = blocks


def _trace(task: Any, *, images: int, precision: str, gpu: bool, cast_weights: bool) -> StepBytes:
    stored, products = PRECISIONS[precision]
    mode = FakeTensorMode()
    fake_weights(task, mode, stored)
    if cast_weights and products is not None:
        for net in trained_nets(task):
            fake_weights(net, mode, products)
    task.train()
    parameters = trained_parameters(task)
    autocast = torch.autocast("cpu", products) if products is not None else nullcontext()
    step = _generator_step if isinstance(task, GPTTask) else _tokenizer_step
    with mode, gpu_rules() if gpu else nullcontext(), LiveBytes() as live:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
            live.set_aside(parameter.grad)
            parameter.register_post_accumulate_grad_hook(lambda p: live.set_aside(p.grad))
        live.restart()
        passes = step(task, images, autocast, stored)
        next(passes)
        forward = live.peak
        live.restart()
        for _ in passes:
            continue
    return StepBytes(forward, live.peak, live.peak_of_all)


def _generator_step(task: GPTTask, images: int, autocast: Any, dtype: torch.dtype) -> Iterator[None]:
    """Yields between the passes."""
    net = task.net
    batch: Any = {"codes": torch.empty(images, net.num_codes, dtype=torch.int64)}
    if hasattr(net.conditioner, "text_dim"):
        length = net.conditioner.num_tokens
        batch["text"] = torch.empty(images, length, net.conditioner.text_dim, dtype=dtype)
        batch["text_mask"] = torch.empty(images, length, dtype=torch.bool)
    else:
        batch["label"] = torch.empty(images, dtype=torch.int64)
    with autocast:
        loss = task.training_loss(batch)
    net.zero_grad()  # as Lightning does, between the two passes
    yield
    loss.backward()


def _tokenizer_step(task: TokenizerTask, images: int, autocast: Any, dtype: torch.dtype) -> Iterator[None]:
    """As :meth:`TokenizerTask.training_step`: all of it under autocast, backward passes too. Yields after the first."""
    size = task.net.image_size
    batch = torch.empty(images, 3, size, size, dtype=torch.uint8)
    image: Tensor = to_float(batch).to(dtype).contiguous(memory_format=torch.channels_last)
    with autocast:
        reconstruction, losses = task.generator_losses(image, adversarial=task.discriminator is not None)
        task.net.zero_grad()
        yield
        losses["loss"].backward()
        if task.discriminator is not None:
            real, fake = task.discriminator(image), task.discriminator(reconstruction.detach())
            loss = task.disc_weight * task.disc_loss(real, fake)
            task.discriminator.zero_grad()
            loss.backward()


def decoding_bytes(tokenizer: Any, *, images: int, gpu: bool) -> int:
    """What a tokenizer on the meta device holds beside its weights when it turns codes of ``images`` into pictures."""
    mode = FakeTensorMode()
    fake_weights(tokenizer, mode)
    with mode, gpu_rules() if gpu else nullcontext(), torch.no_grad(), LiveBytes() as live:
        rows, columns = tokenizer.code_shape[0]
        tokenizer.eval().decode(torch.empty(images, rows * columns, dtype=torch.int64))
    return live.peak


def optimizer_bytes(task: Any, *, precision: str) -> int:
    """State that the optimizers of ``task`` keep: what they make in their first step on fake gradients."""
    mode = FakeTensorMode()
    fake_weights(task, mode, PRECISIONS[precision][0])
    with mode:
        for parameter in trained_parameters(task):
            parameter.grad = torch.empty_like(parameter)
        optimizers = task.configure_optimizers()
        found = optimizers["optimizer"] if isinstance(optimizers, dict) else optimizers[0]
        found = found if isinstance(found, list) else [found]
        for optimizer in found:
            optimizer.step()
        return sum(
            value.untyped_storage().nbytes()
            for optimizer in found
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
