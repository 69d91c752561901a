"""What two gloo processes exchange in a few training steps."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from forked_ranks import run_ranks
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from smalto.tasks.strategy import ShardedStrategy
from tiny_tasks import SHAPE, VOCABULARY, make_codes, make_gpt_task, make_trainer

SETTINGS: list[dict[str, Any]] = [
    {"precision": "32-true", "accumulate": 1, "reduce_once": True},
    {"precision": "bf16-mixed", "accumulate": 2, "reduce_once": True},
    {"precision": "32-true", "accumulate": 2, "reduce_once": False},
]
STEPS = 2


def make_task():
    """Rows that two cannot divide: 33 codes, 5 classes with the null one."""
    net = partial(
        GPT,
        dim=36,
        num_layers=2,
        num_heads=3,
        vocab_size=VOCABULARY + 1,
        code_shape=SHAPE,
        conditioner=partial(ClassConditioner, num_classes=4, drop_prob=0.1),
        ffn_multiple_of=7,
    )
    return make_gpt_task(net=net)


class Buckets(L.Callback):
    """What DDP reduces: the reducer is not Python, but its hook is."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_train_start(self, trainer, pl_module) -> None:
        def hook(state, bucket):
            self.bytes += bucket.buffer().nbytes
            done = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return done.then(lambda future: future.value()[0] / 2)

        trainer.strategy.model.register_comm_hook(None, hook)


def exchanged_by_ddp(folder, rank: int) -> int:
    buckets = Buckets()
    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    trainer = make_trainer(folder / str(rank), buckets, max_steps=STEPS, devices=2, strategy=strategy)
    trainer.fit(make_task(), make_codes())
    return buckets.bytes


def exchanged_by_fsdp(folder, rank: int, *, precision: str, accumulate: int, reduce_once: bool) -> tuple[int, int]:
    gathered, reduced = [], []

    def recorded(name: str, sizes: list[int], large: str, position: int) -> None:
        real = getattr(dist, name, None)

        def call(*args, **kwargs):
            tensor = kwargs[large] if large in kwargs else args[position]
            sizes.append(tensor.nbytes)
            return real(*args, **kwargs)

        if real is not None:
            setattr(dist, name, call)

    for name, large in (("all_gather_single", "output"), ("all_gather_into_tensor", "output_tensor")):
        recorded(name, gathered, large, 0)  # as newer and as older versions of torch call it
    for name in ("reduce_scatter_single", "reduce_scatter_tensor"):
        recorded(name, reduced, "input", 1)
    trainer = make_trainer(
        folder / str(rank),
        max_steps=STEPS,
        devices=2,
        strategy=ShardedStrategy(reduce_once=reduce_once),
        inference_mode=False,
        precision=precision,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    trainer.fit(make_task(), make_codes())
    return sum(gathered), sum(reduced)


def exchanged_bytes(folder: Path) -> dict[str, Any]:
    """Of each strategy, and of each of its ``SETTINGS``, the results of all ranks."""
    found: dict[str, Any] = {"ddp": run_ranks(partial(exchanged_by_ddp, folder), 2)}
    found["fsdp"] = [run_ranks(partial(exchanged_by_fsdp, folder, **settings), 2) for settings in SETTINGS]
    return found
