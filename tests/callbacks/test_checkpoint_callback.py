"""What is left on disk: always one whole checkpoint, never half of one."""

import errno

import pytest
import torch

from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint, step_checkpoints
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
