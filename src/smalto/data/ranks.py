"""Several processes at one job: who they are, and the few things they must agree on."""

import os
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed

from smalto.errors import InputError

PATIENCE = timedelta(days=7)
"""How long a rank waits for others; a rank that fails is noticed by torchrun, which ends all."""


def leads() -> bool:
    """Whether this process is the first of its job, by the environment: torchrun, SLURM or Lightning started it.

    Known before there is a process group, so that the first can prepare what the others find.
    """
    ranks = ("RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "LOCAL_RANK")
    return all(os.environ.get(name, "0") == "0" for name in ranks)


class Ranks:
    """Context of a job started by ``torchrun``, or of one process alone.

    Raises:
        ValueError: WORLD_SIZE is set, but not what is needed to find the others.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        local_rank: of this process on its machine.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world_size > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
            raise InputError(
                f"WORLD_SIZE is {self.world_size}, but RANK, MASTER_ADDR or MASTER_PORT is not set; start the "
                "processes with torchrun --nproc_per_node=N -m smalto extract ..."
            )
        self._began = False

    @property
    def first(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def __enter__(self) -> Self:
        if self.world_size > 1 and not distributed.is_initialized():
            distributed.init_process_group("gloo", timeout=PATIENCE)
            self._began = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._began:
            distributed.destroy_process_group()

    def share(self, value: Any) -> Any:
        """The ``value`` of rank 0, in all ranks; others give anything."""
        if self.world_size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            distributed.barrier()


def shared_device(device: torch.device) -> torch.device:
    """Where tensors of this ``device`` must lie when processes add them up: gloo gathers on the CPU only."""
    joined = distributed.is_available() and distributed.is_initialized()
    return torch.device("cpu") if joined and distributed.get_backend() == "gloo" else device
