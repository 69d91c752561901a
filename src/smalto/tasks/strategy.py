"""``strategy=fsdp``, and checkpoints that any strategy goes on from."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from smalto.errors import StorageError
from smalto.nn.initial import share_of
from smalto.tasks.contents import EMA_KEY
from smalto.tasks.integrity import all_tensors, verified
from smalto.tasks.sharded_folder import Place, ShardWriter, is_folder, read_folder, take_tensors, write_meta
from smalto.tasks.torch_file import read_torch_file


@contextmanager
def _as_os_error() -> Iterator[None]:
    """What torch wraps, as what it was; every process gets the first failure of any."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
        raise StorageError(f"process {rank}: {getattr(cause, 'strerror', None) or cause}") from error


class AnyCheckpoint(TorchCheckpointIO):
    """Plain strategies read checkpoint files as Lightning does, and the folders of :class:`ShardedStrategy` too."""

    def __init__(self, *, verify: bool = True) -> None:
        super().__init__()
        self.verify = verify
        """Whether what is read is compared with the checksums of what was written."""

    def load_checkpoint(self, path: _PATH, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The checkpoint with whole tensors, in every process."""
        if is_folder(path):
            return read_folder(path, verify=self.verify)
        return read_whole(Path(path), verify=self.verify)


def read_whole(path: Path, *, verify: bool, share: Callable[[Place, Tensor], Tensor | None] | None = None) -> Any:
    """A checkpoint file in memory: it may be removed while the training that it belongs to goes on.

    Args:
        path: of the file.
        verify: compare it with its checksums.
        share: this process's part of the tensor at a place; None: all of it.

    Raises:
        InputError: another file, or a damaged one.
    """
    tree = read_torch_file(path)

    def taken(value: Any, place: Place) -> Any:
        if isinstance(value, Tensor):
            part = None if share is None else share(place, value)
            return (value if part is None else part).clone()
        if isinstance(value, dict):
            return {key: taken(entry, (*place, key)) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(taken(entry, (*place, i)) for i, entry in enumerate(value))
        return value

    with verified(path, all_tensors(tree), verify=verify):
        return taken(tree, ())


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2: every process holds a share of each parameter, gradient, moment and average.

    Lightning's own strategy with its sizes set for data parallelism (its ``auto`` counts nodes, not processes) and
    with one shape of checkpoint for all strategies: optimizer states by position, whatever is sharded written by who
    holds it, callbacks' states (the average) included. Lightning keys optimizer states by name, and gathers nothing
    that callbacks hold.

    Args:
        reduce_once: with ``trainer.accumulate_grad_batches``, add gradients up before they are exchanged, once a step;
            every process then holds whole gradients in between. False exchanges after each batch and holds a share.
        async_save: write checkpoints while training goes on, from a copy in main memory. See :meth:`still_saving`.
        timeout_minutes: of a collective operation.
    """

    def __init__(self, *, reduce_once: bool = True, async_save: bool = False, timeout_minutes: float = 30.0) -> None:
        super().__init__(data_parallel_size=1, tensor_parallel_size=1, timeout=timedelta(minutes=timeout_minutes))
        self.reduce_once = reduce_once
        self.async_save = async_save
        self._saving: Future | None = None
        self._writers: Any = None
        self._voters: Any = None

    def setup_environment(self) -> None:
        """All processes share all parameters."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within it gradients are added up where they arise; Lightning enters it for all but the last batch."""
        net = getattr(self.lightning_module, "net", None)
        if not (self.reduce_once and isinstance(net, FSDPModule)):
            yield
            return
        net.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            net.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """By name; sharded parameters as they are."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """By position, as without sharding; moments as they are."""
        return dict(Strategy.optimizer_state(self, optimizer))

    @property
    def lightning_restore_optimizer(self) -> bool:
        """:meth:`load_checkpoint` reads states, Lightning puts them into the optimizers."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """See :attr:`lightning_restore_optimizer`."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Parameters, whole or this process's share."""
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        """A folder; every process writes its share. On the disk when this returns, or once nobody is saving any more.

        Raises:
            OSError: it could not be written, in every process.
        """
        self.finish_saving()
        path = Path(self.broadcast(filepath))
        tree, tensors = take_tensors(checkpoint)
        if self.async_save and self._writers is None:
            # Of their own: the thread that writes talks to those of other processes while training talks too.
            self._writers, self._voters = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
        problem = None
        if self.global_rank == 0:
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_meta(path, tree)
            except OSError as error:
                problem = error
        problem = self.broadcast(problem)
        if problem is not None:
            raise problem
        with _as_os_error():
            if self.async_save:
                future: Any = dcp.async_save(tensors, storage_writer=ShardWriter(path), process_group=self._writers)
                self._saving = future
            else:
                dcp.save(tensors, storage_writer=ShardWriter(path))

    def still_saving(self) -> bool:
        """Whether some process still writes what is no checkpoint yet; to be asked by all at the same step.

        Asked in every step until it is written, so by way of the CPU: no process waits for its device.
        """
        if self._voters is None:
            return False
        saving = torch.tensor(int(self._saving is not None and not self._saving.done()), device="cpu")
        dist.all_reduce(saving, group=self._voters)
        return bool(saving)

    def finish_saving(self) -> None:
        """Wait until this process, and with it the coordinating one, has written.

        Raises:
            OSError: something could not be written.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            with _as_os_error():
                saving.result()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder, or a file that another strategy wrote: each process keeps its share of what it shares."""
        path = Path(self.broadcast(checkpoint_path))
        if is_folder(path):
            return read_folder(path, like=self._like, verify=self._verify)
        return read_whole(path, verify=self._verify, share=self._share)

    @property
    def _verify(self) -> bool:
        return getattr(self.checkpoint_io, "verify", True)

    def _like(self, place: Place) -> Tensor | None:
        """The sharded tensor that belongs to a place in a checkpoint."""
        module: Any = self.lightning_module
        match place:
            case ("state_dict", str(name)):
                return dict(module.named_parameters()).get(name)
            case ("callbacks", str(key), "shadow", str(name)) if key == EMA_KEY:
                return dict(module.net.named_parameters()).get(name)
            case ("optimizer_states", int(i), "state", int(position), _) if i < len(self.optimizers):
                groups = self.optimizers[i].param_groups
                parameters = [parameter for group in groups for parameter in group["params"]]
                return parameters[position] if position < len(parameters) else None
        return None

    def _share(self, place: Place, whole: Tensor) -> Tensor | None:
        like = self._like(place)
        return None if like is None or like.shape != whole.shape else share_of(whole, like)
