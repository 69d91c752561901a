"""Processes killed with SIGKILL in the middle of a step, or of a checkpoint, go on bit for bit.

Real shards on disk, random crops, mirroring, dropout, label drop, EMA, a discriminator that starts on the way.
"""

import hashlib
import json
import multiprocessing
import os
import signal
from functools import partial

import lightning as L
import pytest
import torch
from test_codes import CODEBOOK, SHAPE, code_shards
from test_codes import module as code_module
from test_distributed_data import images, numbered_images

from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint
from smalto.callbacks.ema import EMA
from smalto.callbacks.step_seed import StepSeed
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from tiny_tasks import TOKENIZER, make_gpt_task, make_tokenizer_task, make_trainer

STEPS, EVERY = 12, 2


def tokenizer_task(folder, workers):
    net = partial(TOKENIZER, image_size=8, dropout=0.1)
    return make_tokenizer_task(net=net, disc_start=3), images(folder, workers)


def gpt_task(folder, workers):
    net = partial(
        GPT,
        dim=32,
        num_layers=2,
        num_heads=2,
        vocab_size=CODEBOOK,
        code_shape=tuple(map(tuple, SHAPE)),
        conditioner=partial(ClassConditioner, num_classes=5, drop_prob=0.3),
        resid_dropout=0.1,
        ffn_multiple_of=16,
    )
    return make_gpt_task(net=net), code_module(folder, num_workers=workers)


class Watch(L.Callback):
    """Losses as hex floats, on disk as they come."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, *args):
        loss = float(pl_module.step_log.read()["train/loss"])
        with self.path.open("a") as file:
            file.write(f"{trainer.global_step} {loss.hex()}\n")


class Die(L.Callback):
    """SIGKILL to its own process: in the step that follows ``step``, or while the checkpoint of ``step`` is written."""

    def __init__(self, step, *, saving):
        self.step, self.saving = step, saving

    def on_train_start(self, trainer, pl_module):
        if self.saving:
            write = trainer.save_checkpoint

            def die_half_way(path, *args, **kwargs):
                write(path, *args, **kwargs)
                if trainer.global_step == self.step:
                    os.truncate(path, path.stat().st_size // 2)
                    os.kill(os.getpid(), signal.SIGKILL)

            trainer.save_checkpoint = die_half_way
        else:
            # for the tokenizer: the generator has stepped, its discriminator not yet
            name = "_discriminator_step" if hasattr(pl_module, "_discriminator_step") else "training_step"
            go_on = getattr(pl_module, name)

            def die(*args):
                if trainer.global_step >= self.step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return go_on(*args)

            setattr(pl_module, name, die)


def digest(value, total):
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest(value[key], total)
    elif isinstance(value, (list, tuple)):
        for item in value:
            digest(item, total)
    elif isinstance(value, torch.Tensor):
        total.update(value.detach().contiguous().numpy().tobytes())
    else:
        total.update(repr(value).encode())
    return total.hexdigest()


def train(make, data, folder, workers, die=None):
    torch.set_num_threads(1)
    torch.manual_seed(1)
    average = EMA(decay=0.9)
    callbacks = [StepSeed(seed=0), average, Watch(folder / "losses.txt")]
    if die is not None:
        callbacks.append(die)
    callbacks.append(LatestCheckpoint(dirpath=folder / "checkpoints", every_n_steps=EVERY))
    task, module = make(data, workers)
    trainer = make_trainer(folder, *callbacks, max_steps=STEPS)
    start = newest_checkpoint(folder / "checkpoints")
    trainer.fit(task, module, ckpt_path=start, weights_only=True)
    state = [task.state_dict(), average.shadow, [o.state_dict() for o in trainer.optimizers]]
    (folder / "final.json").write_text(json.dumps(digest(state, hashlib.sha256())))


def in_process(*args) -> int:
    """Exit code of ``train`` in a process of its own; minus the number of the signal that ended it."""
    job = multiprocessing.get_context("fork").Process(target=train, args=args)
    job.start()
    job.join()  # with a timeout it would wait for the workers too, which notice only after seconds
    return job.exitcode


def losses(folder) -> list[str]:
    return (folder / "losses.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Unbroken runs, each made once: task to (maker, data, losses, hash of the end)."""
    runs = {}
    for name, make, write in (("tokenizer", tokenizer_task, numbered_images), ("gpt", gpt_task, code_shards)):
        folder = tmp_path_factory.mktemp(name)
        for part in ("data", "run"):
            (folder / part).mkdir()
        write(folder / "data")
        assert in_process(make, folder / "data", folder / "run", 0) == 0
        runs[name] = make, folder / "data", losses(folder / "run"), (folder / "run" / "final.json").read_text()
    return runs


# both have five batches an epoch: in an epoch, at its end, and after it; and in a checkpoint being written
@pytest.mark.parametrize(
    ("workers", "step", "saving"),
    [
        pytest.param(*case, marks=marks)
        for marks, cases in (
            ((), [(0, 4, False), (2, 5, False), (0, 9, False), (2, 8, True)]),
            (pytest.mark.slow, [(2, 4, False), (0, 5, False), (2, 9, False), (0, 8, True)]),
        )
        for case in cases
    ],
)
@pytest.mark.parametrize("task", ["tokenizer", "gpt"])
def test_a_killed_process_goes_on_bit_for_bit(tmp_path, whole, task, workers, step, saving):
    make, data, expected, end = whole[task]
    assert in_process(make, data, tmp_path, workers, Die(step, saving=saving)) == -signal.SIGKILL
    before = losses(tmp_path)
    saved = newest_checkpoint(tmp_path / "checkpoints")
    # a kill in a checkpoint leaves the one before
    assert int(saved.stem.removeprefix("step_")) == (step - EVERY if saving else (len(before) // EVERY) * EVERY)
    assert in_process(make, data, tmp_path, workers) == 0
    after = losses(tmp_path)[len(before) :]
    assert before == expected[: len(before)]
    assert after == expected[-len(after) :]
    assert len(before) + len(after) >= STEPS
    assert (tmp_path / "final.json").read_text() == end
