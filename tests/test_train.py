"""``smalto train`` as a function: one folder a run, continued by the same call, never overwritten by another."""

import json
import os
import signal

import pytest

from smalto import train
from smalto.runtime import compose
from tiny_tasks import TINY_GPT

SYNTHETIC = [
    *TINY_GPT,
    "callbacks=_common",
    "logger=csv",
    "model.num_layers=1",
    "data.num_train=32",
    "data.num_val=8",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "trainer.accelerator=cpu",
    "callbacks.checkpoint.every_n_steps=2",
]


def config(folder, *overrides: str):
    return compose("train", [*SYNTHETIC, f"run_dir={folder}", *overrides])


def test_a_run_leaves_config_checkpoint_and_metrics(tmp_path):
    metrics = train.run(config(tmp_path / "run"))
    assert metrics["val/loss"] > 0
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == metrics
    assert (tmp_path / "run/checkpoints/last.ckpt").resolve().name == "step_00000006.ckpt"
    assert "commit" in json.loads((tmp_path / "run/provenance.json").read_text())


def test_the_same_call_again_returns_what_was_measured(tmp_path):
    first = train.run(config(tmp_path / "run"))
    written = (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns
    assert train.run(config(tmp_path / "run")) == first
    assert (tmp_path / "run/checkpoints/last.ckpt").stat().st_mtime_ns == written


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    train.run(config(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"seed: 0 -> 1.*overwrite=true"):
        train.run(config(tmp_path / "run", "seed=1"))
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


def test_overwrite_starts_anew(tmp_path):
    first = train.run(config(tmp_path / "run"))
    again = train.run(config(tmp_path / "run", "seed=1", "overwrite=true"))
    assert again["val/loss"] != first["val/loss"]
    assert len(list((tmp_path / "run/checkpoints").glob("step_*.ckpt"))) == 1


def test_a_run_that_failed_before_training_leaves_its_folder_free(tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        train.run(config(tmp_path / "run", "data.batch_size=64"))
    train.run(config(tmp_path / "run"))


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    whole = train.run(config(tmp_path / "whole", "callbacks.checkpoint.keep=0"))
    train.run(config(tmp_path / "run", "callbacks.checkpoint.keep=0"))
    newest = tmp_path / "run/checkpoints/step_00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (tmp_path / "run/metrics.json").unlink()
    again = train.run(config(tmp_path / "run", "callbacks.checkpoint.keep=0"))
    assert again["val/loss"] == whole["val/loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step_and_the_same_call_goes_on(tmp_path, monkeypatch, number):
    whole = train.run(config(tmp_path / "whole"))
    from smalto.tasks.gpt import GPTTask

    step = GPTTask.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 2:  # in the middle of the third step
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(GPTTask, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(tmp_path / "run"))
    assert (tmp_path / "run/checkpoints/step_00000003.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is before
    again = train.run(config(tmp_path / "run"))
    for key in ("train/loss", "val/loss", "val/accuracy"):
        assert again[key] == whole[key], f"{key} differs after an interruption"


def test_ckpt_path_last_is_the_newest_of_the_run(tmp_path):
    first = train.run(config(tmp_path / "run", "ckpt_path=last"))
    (tmp_path / "run/metrics.json").unlink()
    assert train.run(config(tmp_path / "run", "ckpt_path=last"))["val/loss"] == first["val/loss"]


def test_resuming_by_the_run_folders_own_config(tmp_path):
    from omegaconf import OmegaConf

    first = train.run(config(tmp_path / "run"))
    (tmp_path / "run/metrics.json").unlink()
    own = OmegaConf.load(tmp_path / "run/config.yaml")
    assert train.run(own)["val/loss"] == first["val/loss"]
