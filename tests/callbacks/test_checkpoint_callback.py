"""What is left on disk: always one whole checkpoint, never half of one."""

import errno
import os
import signal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint, step_checkpoints
from smalto.callbacks.step_seed import StepSeed
from tiny_tasks import make_codes, make_gpt_task, make_trainer


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_keeps_the_newest_and_saves_the_end(tmp_path, keep, left):
    saver = LatestCheckpoint(dirpath=tmp_path / "c", every_n_steps=2, keep=keep)
    make_trainer(tmp_path, saver, max_steps=6).fit(make_gpt_task(), make_codes())
    assert [int(path.stem.removeprefix("step_")) for path in step_checkpoints(tmp_path / "c")] == left
    assert (tmp_path / "c/last.ckpt").resolve().name == "step_00000006.ckpt"


def test_saves_the_end_off_the_interval(tmp_path):
    saver = LatestCheckpoint(dirpath=tmp_path, every_n_steps=4)
    make_trainer(tmp_path, saver, max_steps=5).fit(make_gpt_task(), make_codes())
    assert newest_checkpoint(tmp_path).name == "step_00000005.ckpt"


def test_a_full_disk_leaves_the_last_good_one_and_says_so(tmp_path, monkeypatch):
    saver = LatestCheckpoint(dirpath=tmp_path, every_n_steps=2)
    trainer = make_trainer(tmp_path, saver, max_steps=6)
    write = trainer.save_checkpoint

    def full(path, *args, **kwargs):
        if "00000004" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *args, **kwargs)

    monkeypatch.setattr(trainer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"step_00000004.*No space.*step_00000002.ckpt stays good"):
        trainer.fit(make_gpt_task(), make_codes())
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002.ckpt"]
    torch.load(newest_checkpoint(tmp_path), weights_only=True)


@pytest.mark.parametrize("setting", [{"every_n_steps": 0}, {"every_n_steps": 1, "keep": -1}])
def test_impossible_settings_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match="every_n_steps"):
        LatestCheckpoint(dirpath=tmp_path, **setting)


class Signal(L.Callback):
    """Comes with a batch, in the middle of a step of several."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


def accumulated(folder, *callbacks) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    task, start = make_gpt_task(), newest_checkpoint(folder)
    saver = LatestCheckpoint(dirpath=folder, every_n_steps=2)
    trainer = make_trainer(folder, StepSeed(seed=0), *callbacks, saver, max_steps=3, accumulate_grad_batches=2)
    trainer.fit(task, make_codes(), ckpt_path=start, weights_only=True)
    return task.state_dict()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_signal_within_an_accumulated_step_waits_for_its_end(tmp_path, batch):
    whole = accumulated(tmp_path / "whole")
    with pytest.raises(SystemExit):
        accumulated(tmp_path / "cut", Signal(batch))
    assert newest_checkpoint(tmp_path / "cut").name == f"step_{batch // 2 + 1:08d}.ckpt"
    resumed = accumulated(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_checkpoint_counts_when_its_step_has_logged_everything(tmp_path):
    class Rows(Logger):
        name, version = "rows", 0
        logged = flushed = -1

        def log_hyperparams(self, *args) -> None:
            pass

        def log_metrics(self, metrics, step=None) -> None:
            self.logged = step

        def save(self) -> None:
            self.flushed = self.logged

    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            last = tmp_path / "last.ckpt"
            if last.exists() and last.resolve().name not in [name for name, _ in seen]:
                seen.append((last.resolve().name, trainer.logger.flushed))

        on_validation_start = on_train_batch_end = on_train_batch_start

    saver = LatestCheckpoint(dirpath=tmp_path, every_n_steps=2)
    settings = {"logger": Rows(), "log_every_n_steps": 1, "val_check_interval": 4}
    make_trainer(tmp_path, Look(), saver, max_steps=7, **settings).fit(make_gpt_task(), make_codes())
    assert [(name, step >= int(name[5:13]) - 1) for name, step in seen] == [
        (f"step_{step:08d}.ckpt", True) for step in (2, 4, 6)
    ]
