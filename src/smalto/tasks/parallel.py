"""One model over many processes: built without memory, sharded, filled with weights that do not depend on how many."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method


@contextmanager
def from_the_seed() -> Iterator[None]:
    """Random numbers start over at the seed of the run within it, and go on outside as if nothing had been drawn.

    What was drawn before depends on the strategy (some seed again) and on which callbacks a run has; the initial
    weights must not.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed())
        yield


def build_sharded(factory: Callable[[], Any], mesh: DeviceMesh | None, *, device: torch.device, half: bool) -> Any:
    """A model with its initial weights, built on the meta device; the whole never exists where it is sharded.

    Args:
        factory: makes the model, which has ``blocks`` and ``init_weights``.
        mesh: processes that share the parameters; None keeps them whole.
        device: of the weights.
        half: see :func:`shard_blocks`.
    """
    with torch.device("meta"):
        net = factory()
    if mesh is not None:
        shard_blocks(net, mesh, half=half)
    net.to_empty(device=device)
    with from_the_seed():
        net.init_weights()
    return net


def shard_blocks(net: Any, mesh: DeviceMesh, *, half: bool) -> None:
    """Divide every parameter among the processes along its first axis (FSDP2): a group per block, one for the rest.

    A block is gathered when its turn comes and dropped after it. The root, first and last in both directions, stays
    from the forward pass to its backward pass. Without gradients it is dropped too: kept from a validation of averaged
    weights to the next training step, it would be taken for the current one.

    Args:
        net: with ``blocks``.
        mesh: one-dimensional.
        half: gather and multiply in bfloat16, add gradients up and keep weights in float32. The residual stream is
            bfloat16 then, as under the authors' FSDP; inputs are not cast, or the rotary table would lose digits.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,
    )
    for block in net.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(net, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    net.register_forward_hook(lambda *_: _drop_without_backward(net))  # after that of fully_shard
    register_fsdp_forward_method(net, "apply_head")
    apply_head = net.apply_head

    @wraps(apply_head)
    def apply_head_and_drop(*args: Any, **kwargs: Any) -> Any:
        result = apply_head(*args, **kwargs)
        _drop_without_backward(net)
        return result

    net.apply_head = apply_head_and_drop


def _drop_without_backward(net: Any) -> None:
    if not torch.is_grad_enabled():
        net.reshard()


@dataclass(frozen=True)
class ShardingPlan:
    """Who holds what of a model that :func:`shard_blocks` divides.

    Args:
        processes: that share it.
        blocks: number of them.
        block_parameters: of each, gathered together.
        root_parameters: embeddings, last norm and output layer, gathered together.
        held: parameters of the process that holds most.
    """

    processes: int
    blocks: int
    block_parameters: int
    root_parameters: int
    held: int

    @classmethod
    def of(cls, net: Any, processes: int) -> "ShardingPlan":
        """From shapes alone: a model on the meta device will do."""
        sizes = [_count(block) for block in net.blocks]
        held = sum(-(-p.shape[0] // processes) * math.prod(p.shape[1:]) for p in net.parameters())
        return cls(processes, len(sizes), max(sizes), _count(net) - sum(sizes), held)

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.blocks * self.block_parameters + self.root_parameters

    def __str__(self) -> str:
        # Weight, gradient and two moments of AdamW, float32; gathered: the root and two blocks, one of them in advance.
        state = 16 * self.held / 1e9
        gathered = 4 * (self.root_parameters + 2 * self.block_parameters) / 1e9
        return (
            f"{self.parameters:,} parameters over {self.processes} processes, at most {self.held:,} each "
            f"({self.held / self.parameters:.1%}): {self.blocks} blocks of {self.block_parameters:,} and a root of "
            f"{self.root_parameters:,}; per process {state:.2f} GB of weights, gradients and AdamW's moments, and at "
            f"most {gathered:.2f} GB of weights gathered (half of it in bfloat16)"
        )


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
