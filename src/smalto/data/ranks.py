"""Several processes at one job: who they are, and the few things they must agree on."""

import os
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from smalto.errors import InputError, UserError

T = TypeVar("T")

PATIENCE = timedelta(days=1)
"""How long a rank waits for the work of others: a share of images, or scores that rank 0 computes alone. One that has
ended is noticed at once: its connections close, and torchrun ends all."""
DECISION = timedelta(minutes=10)
"""How long a rank waits where all come at about the same time: at the start, and for what rank 0 decides."""


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
            try:
                store, rank, world_size = next(rendezvous("env://", timeout=DECISION))
            except RuntimeError as error:
                raise UserError(
                    f"the {self.world_size} processes of this job did not meet within {DECISION}; start all of them, "
                    f"with the same MASTER_ADDR and MASTER_PORT ({_first_line(error)})"
                ) from error
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
            self._began = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._began:
            distributed.destroy_process_group()

    def share(self, value: Any) -> Any:
        """The ``value`` of rank 0, in all ranks; others give anything. All must come within ten minutes.

        Raises:
            UserError: some did not come; rank 0 names them.
        """
        if self.world_size == 1:
            return value
        try:
            distributed.monitored_barrier(timeout=DECISION, wait_all_ranks=True)
        except RuntimeError as error:
            raise UserError(
                f"process {self.rank} waited in vain for others of this job ({_first_line(error)}): they ended, or "
                f"did not come within {DECISION}; what they wrote says why, the same command goes on"
            ) from error
        return from_first(value, world_size=self.world_size)

    def decide(self, function: Callable[[], T]) -> T:
        """What ``function`` gives in rank 0, in all ranks; it may take long, and what a user can mend ends all.

        Raises:
            UserError: what it raised in rank 0.
        """
        if self.world_size == 1:
            return function()
        value: T | None = None
        problem: UserError | None = None
        if self.first:
            try:
                value = function()
            except UserError as error:
                problem = error
        self.wait()
        value, text = self.share((value, problem and str(problem)))
        if problem is not None:
            raise problem
        if text is not None:
            raise UserError(f"the first process stopped: {text}")
        return cast(T, value)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            distributed.barrier()


def from_first(value: Any, *, world_size: int) -> Any:
    """The ``value`` of the first of ``world_size`` processes in all of them, by the process group they are in."""
    if world_size == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def agreed(function: Callable[[], T], *, world_size: int) -> T:
    """What ``function`` gives in this process; what a user can mend in any of ``world_size`` processes ends all.

    For what each looks up on its own disk before all begin to talk: one that stopped alone would leave the others
    waiting for it.

    Raises:
        UserError: what it raised here, or that another process stopped and why.
    """
    if world_size == 1:
        return function()
    value: T | None = None
    problem: UserError | None = None
    try:
        value = function()
    except UserError as error:
        problem = error
    told: list[Any] = [None] * world_size
    distributed.all_gather_object(told, problem and str(problem))
    if problem is not None:
        raise problem
    for rank, text in enumerate(told):
        if text is not None:
            raise UserError(f"process {rank} stopped: {text}")
    return cast(T, value)


def shared_device(device: torch.device) -> torch.device:
    """Where tensors of this ``device`` must lie when processes add them up: gloo gathers on the CPU only."""
    joined = distributed.is_available() and distributed.is_initialized()
    return torch.device("cpu") if joined and distributed.get_backend() == "gloo" else device


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
