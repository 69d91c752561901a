"""Initial weights as a function of a seed and a parameter's name.

Neither what was drawn before nor the number of processes that share the parameter matters, so a sharded model starts
from the same weights, bit for bit, as one that lies whole in one process.
"""

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def draw_normal(parameter: Tensor, *, std: float, seed: int, name: str) -> None:
    """Fill with normal numbers, drawn on the CPU whatever device the parameter is on; nothing on the meta device.

    Of a sharded parameter every process draws the whole, one parameter at a time, and keeps its share.
    """
    if parameter.is_meta:
        return
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32 and not isinstance(parameter, DTensor):
        parameter.normal_(std=std, generator=generator)
        return
    whole = torch.empty(parameter.shape, device="cpu", dtype=torch.float32).normal_(std=std, generator=generator)
    parameter.copy_(share_of(whole, parameter))


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of ``whole`` when it is laid out as ``like``; without communication.

    Args:
        whole: the same in every process.
        like: of the same shape; sharded, or a plain tensor, for which ``whole`` comes back as it is.
    """
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
