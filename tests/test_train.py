"""``smalto train`` as a function: one folder a run, continued by the same call, never overwritten by another."""

import csv
import json
import os
import re
import shutil
import signal
from zipfile import ZipFile

import lightning as L
import pytest

from smalto import train
from smalto.errors import InputError, PathInUse, StorageError
from smalto.files import FileLock, alone_in
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


def cut(checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])


def flip(checkpoint):
    """One bit of the largest tensor."""
    with ZipFile(checkpoint) as archive:
        largest = archive.read(max(archive.infolist(), key=lambda entry: entry.file_size))
    data = checkpoint.read_bytes()
    changed = bytearray(largest)
    changed[len(changed) // 2] ^= 8
    checkpoint.write_bytes(data.replace(largest, changed, 1))


@pytest.mark.parametrize(
    ("damage", "how"),
    [pytest.param(cut, "truncated", marks=pytest.mark.slow), (flip, ".*the checksum of .*/data/.* differs")],
)
def test_a_damaged_checkpoint_is_passed_over_and_that_is_said(tmp_path, damage, how):
    first = train.run(config(tmp_path / "run", "callbacks.checkpoint.keep=0"))
    damage(tmp_path / "run/checkpoints/step_00000006.ckpt")
    (tmp_path / "run/metrics.json").unlink()
    again = train.run(config(tmp_path / "run", "callbacks.checkpoint.keep=0"))
    assert again["val/loss"] == first["val/loss"]
    said = (tmp_path / "run/train.log").read_text()
    assert re.search(rf"step_00000006.ckpt is damaged \({how}\).*step_00000004.ckpt is the newest whole one", said)


@pytest.mark.parametrize(
    ("keep", "said"), [(1, "the only checkpoint .*step_00000006.ckpt is"), (2, "all 2 checkpoints")]
)
def test_a_run_of_which_no_checkpoint_is_whole_stops_until_it_is_told_to_begin_anew(tmp_path, keep, said):
    settings = [f"callbacks.checkpoint.keep={keep}"]
    first = train.run(config(tmp_path / "run", *settings))
    for checkpoint in (tmp_path / "run/checkpoints").glob("step_*"):
        (flip if keep == 1 else cut)(checkpoint)
    (tmp_path / "run/metrics.json").unlink()
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=f"{said}.* damaged.*overwrite=true"):
        train.run(config(tmp_path / "run", *settings))
    with pytest.raises(InputError, match=r"seed: 0 -> 1"):  # nor is the folder free for another run
        train.run(config(tmp_path / "run", *settings, "seed=1"))
    assert contents(tmp_path / "run").items() >= before.items()
    again = train.run(config(tmp_path / "run", *settings, "overwrite=true"))
    assert again["val/loss"] == first["val/loss"]


def contents(folder):
    """Every file but the log, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train.log"}


def test_a_folder_in_which_somebody_trains_is_not_touched(tmp_path):
    train.run(config(tmp_path / "run"))
    (tmp_path / "run/metrics.json").unlink()
    for setting in ("seed=0", "overwrite=true"):
        with FileLock(tmp_path / "run/.lock"):
            before = contents(tmp_path / "run")
            with pytest.raises(
                PathInUse, match=rf"run is in use by process {os.getpid()} on .*wait until it has ended"
            ):
                train.run(config(tmp_path / "run", setting))
            assert contents(tmp_path / "run") == before
    with alone_in(tmp_path / "run"):  # the job of a sweep, which holds its folder
        train.run(config(tmp_path / "run"))
    assert not (tmp_path / "run/.lock").exists()


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_a_run_folder_that_is_removed_ends_the_run_with_one_message(tmp_path, monkeypatch, logger):
    def remove(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)

    monkeypatch.setattr(L.Callback, "on_train_batch_start", remove)
    with pytest.raises(StorageError, match=r"run/(checkpoints|logs).* (is gone|was the run folder removed)"):
        train.run(config(tmp_path / "run", f"logger={logger}"))
    assert not list(tmp_path.rglob("*.ckpt")), "a run without its config was begun in its place"


def rows(folder):
    with (folder / "logs/metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v and "_per_second" not in k} for row in csv.DictReader(file)]


def test_rows_of_a_run_that_saved_nothing_do_not_stand_for_those_of_other_settings(tmp_path):
    def stop(*args):
        raise RuntimeError("before anything is saved")

    every = "trainer.log_every_n_steps=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smalto.callbacks.checkpoint.LatestCheckpoint.save", stop)
        with pytest.raises(RuntimeError, match="before"):
            train.run(config(tmp_path / "run", every))
    assert rows(tmp_path / "run")
    train.run(config(tmp_path / "run", every, "seed=1", "~callbacks.throughput"))
    train.run(config(tmp_path / "whole", every, "seed=1", "~callbacks.throughput"))
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_at_the_end_of_the_step_and_the_same_call_goes_on(tmp_path, monkeypatch, number):
    every = ["trainer.log_every_n_steps=1", "~callbacks.throughput"]
    whole = train.run(config(tmp_path / "whole", *every))
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
            train.run(config(tmp_path / "run", *every))
    assert (tmp_path / "run/checkpoints/step_00000003.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is before
    assert train.run(config(tmp_path / "run", *every)) == whole
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_ckpt_path_last_is_the_newest_of_the_run(tmp_path):
    first = train.run(config(tmp_path / "run", "ckpt_path=last"))
    (tmp_path / "run/metrics.json").unlink()
    assert train.run(config(tmp_path / "run", "ckpt_path=last"))["val/loss"] == first["val/loss"]


def test_a_checkpoint_of_another_model_is_refused_in_a_line(tmp_path):
    train.run(config(tmp_path / "run"))
    other = f"ckpt_path={tmp_path}/run/checkpoints/last.ckpt"
    with pytest.raises(InputError, match=r"last.ckpt does not fit the model of this command: size mismatch for net"):
        train.run(config(tmp_path / "wider", other, "model.dim=64"))
    options = ["task=tokenizer", "data=synthetic_images", "tokenizer=demo", "callbacks=none", "logger=none"]
    tokenizer = compose("train", [*options, "image_size=32", other, f"run_dir={tmp_path}/tokenizer"])
    with pytest.raises(InputError, match=r"last.ckpt holds a gpt, a tokenizer is needed here"):
        train.run(tokenizer)


def test_resuming_by_the_run_folders_own_config(tmp_path):
    from omegaconf import OmegaConf

    first = train.run(config(tmp_path / "run"))
    (tmp_path / "run/metrics.json").unlink()
    own = OmegaConf.load(tmp_path / "run/config.yaml")
    assert train.run(own)["val/loss"] == first["val/loss"]


def test_an_option_that_came_later_and_is_off_does_not_stop_an_older_run():
    old = {"task": {"disc_start": 3}, "trainer": {"max_steps": 4}}
    new = {"task": {"disc_start": 3, "compile": False}, "trainer": {"max_steps": 4, "benchmark": True}}
    assert train.differing_keys(old, new) == []
    new["task"]["compile"] = True
    assert train.differing_keys(old, new) == ["task.compile: None -> True"]


def test_an_option_that_was_off_by_null_is_one_that_was_there():
    old, new = {"trainer": {"gradient_clip_val": None}}, {"trainer": {"gradient_clip_val": 0}}
    assert train.differing_keys(old, new) == ["trainer.gradient_clip_val: None -> 0"]
