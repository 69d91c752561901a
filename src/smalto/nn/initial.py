"""Initial weights as a function of a seed and a parameter's name.

Neither what was drawn before nor the number of processes that share the parameter matters, so a sharded model starts
from the same weights, bit for bit, as one that lies whole in one process.
"""

import hashlib
import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

BLOCK = 2**20
"""Numbers that one generator draws: whole rows, so that a process draws little that others keep."""


@torch.no_grad()
def draw_normal(parameter: Tensor, *, std: float, seed: int, name: str) -> None:
    """Fill with normal numbers, drawn on the CPU whatever device the parameter is on; nothing on the meta device.

    Args:
        parameter: float; if it is sharded, along its first axis.
        std: standard deviation.
        seed: of the model.
        name: of the parameter.
    """
    if parameter.is_meta:
        return
    local, first = _rows(parameter)
    count = max(1, BLOCK // math.prod(parameter.shape[1:]))
    end = first + len(local)
    for start in range(first - first % count, end, count):
        stop = min(start + count, parameter.shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        block = torch.empty(stop - start, *parameter.shape[1:], device="cpu", dtype=torch.float32)
        block.normal_(std=std, generator=generator)
        low, high = max(start, first), min(stop, end)
        local[low - first : high - first] = block[low - start : high - start]


def _rows(parameter: Tensor) -> tuple[Tensor, int]:
    """What of a parameter is here, and the index of its first row."""
    if not isinstance(parameter, DTensor):
        return parameter.detach(), 0
    mesh = parameter.device_mesh
    assert mesh.ndim == 1, parameter.placements
    assert parameter.placements[0].is_shard(0), parameter.placements
    return parameter.to_local().detach(), mesh.get_local_rank() * -(-parameter.shape[0] // mesh.size())


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of ``whole`` when it is laid out as ``like``; without communication.

    Args:
        whole: the same in every process.
        like: of the same shape; sharded, or a plain tensor, for which ``whole`` comes back as it is.
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
