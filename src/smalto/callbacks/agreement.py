"""One question to all processes, answered without anybody waiting."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Whether any process has raised its flag: the same answer in all of them, one call late.

    The question travels between main memories while the next step is computed, so neither a device nor its queue of
    work is waited for; asking through the training's own process group would stop every step on a GPU.
    """

    def __init__(self) -> None:
        self._group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")
        self._asked: tuple[Any, Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Whether some process had raised its flag at the last call; alone: whether it is raised now.

        All processes must call it equally often.
        """
        if self._group is None:
            return flag
        answer = self.answer()
        raised = torch.tensor(int(flag), dtype=torch.int32)
        self._asked = (dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._group, async_op=True), raised)
        return answer

    def answer(self) -> bool:
        """Of the last call, waiting for it if need be; False when nothing was asked since."""
        if self._asked is None:
            return False
        work, raised = self._asked
        self._asked = None
        work.wait()
        return bool(raised)
