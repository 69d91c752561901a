"""Evaluation while training: it measures, draws sheets, and changes nothing about the training."""

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_features import TinyFeatures

from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.ema import EMA
from smalto.callbacks.generation import Generation
from smalto.callbacks.progress import StepProgress
from smalto.callbacks.reconstruction import Reconstruction
from smalto.callbacks.step_seed import StepSeed
from smalto.callbacks.throughput import Throughput
from smalto.callbacks.validation import Validation
from smalto.data.synthetic import SyntheticImages
from smalto.types import SamplingConfig
from tiny_tasks import make_codes as codes
from tiny_tasks import make_gpt_task, make_images, make_tokenizer_task, make_trainer


def generation(**overrides) -> Generation:
    reference = SyntheticImages(image_size=16, num_classes=3, num_train=4, num_val=24, batch_size=8, seed=0)
    settings = {
        "features": TinyFeatures(),
        "reference": reference,
        "sampling": SamplingConfig(cfg_scale=2.0),
        "every_n_steps": 2,
        "num_samples": 12,
        "final_num_samples": 18,
        "batch_size": 5,
        "sheet_columns": 2,
    }
    return Generation(**settings | overrides)


@pytest.fixture
def tokenized(make_vq):
    """A generator's task with a tokenizer riding along."""

    def make():
        torch.manual_seed(0)
        task = make_gpt_task(tokenizer_ckpt="attached by hand")
        task.net = task.net_factory()
        torch.manual_seed(0)
        task.attach_tokenizer(make_vq(), {})
        return task

    return make


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(pl_module.step_log.read()["train/loss"]).hex())


def test_generation_measures_and_draws(tmp_path, tokenized):
    callback = generation()
    make_trainer(tmp_path, EMA(decay=0.5), callback, max_steps=5).fit(tokenized(), codes())
    name = TinyFeatures().name
    for tier in ("gen/", "gen/n18/"):  # at the end: the count of the curve, and the larger one beside it
        assert {f"{tier}{metric}_{name}" for metric in ("fid", "sfid", "is", "class_accuracy")} <= set(callback.metrics)
    steps = sorted(path.name for path in (tmp_path / "sheets/gen").iterdir())
    assert steps == ["step_00000002.png", "step_00000004.png", "step_00000005.png"]


def test_generation_measures_whole_steps_once_where_the_training_computes(tmp_path, tokenized, monkeypatch):
    events = []

    class Device(SingleDeviceStrategy):
        """As on a GPU, where Lightning's teardown moves the model to the CPU."""

        def teardown(self):
            events.append("off the device")
            super().teardown()

    class Saver(LatestCheckpoint):
        def save(self, trainer):
            events.append(f"save {trainer.global_step}")
            super().save(trainer)

    callback = generation(every_n_steps=1)
    monkeypatch.setattr(callback, "evaluate", lambda trainer, module, tiers: events.append(trainer.global_step))
    monkeypatch.setattr(EMA, "on_validation_end", lambda *_: events.append("validated"))
    trainer = make_trainer(
        tmp_path,
        callback,
        EMA(decay=0.5),
        Validation(tmp_path),
        Saver(dirpath=tmp_path / "checkpoints", every_n_steps=10),
        max_steps=2,
        accumulate_grad_batches=2,
        strategy=Device(device=torch.device("cpu")),
        accelerator="auto",
    )
    trainer.fit(tokenized(), codes())
    last = len(events) - 1 - events[::-1].index(2)
    assert [event for event in events if isinstance(event, int)] == [1, 2]
    assert events.index("save 2") < last < events.index("off the device")
    assert events.index("validated") < last


def test_an_interrupted_last_evaluation_is_made_up_for(tmp_path, tokenized, monkeypatch):
    done = []
    callback = generation(every_n_steps=0)
    monkeypatch.setattr(callback, "evaluate", lambda trainer, module, tiers: done.append((trainer.global_step, tiers)))
    trainer = make_trainer(tmp_path, callback, max_steps=0, check_val_every_n_epoch=None)
    task = tokenized()
    trainer.fit(task, codes())  # nothing is left to train
    assert not done
    assert not callback.finished
    trainer.validate(task, codes(), verbose=False)
    assert done == [(0, [12, 18])]
    assert callback.finished


def test_samples_that_do_not_fit_are_told_after_the_first_step(tmp_path, tokenized, monkeypatch):
    monkeypatch.setattr("smalto.sampling.memory.free_bytes", lambda device: 100_000)
    trainer = make_trainer(tmp_path, generation(every_n_steps=100, batch_size=500), max_steps=50)
    with pytest.raises(ValueError, match=r"callbacks\.generation\.batch_size=500.*the largest batch that fits is"):
        trainer.fit(tokenized(), codes())
    assert trainer.global_step == 1


def test_generation_compares_guidance_scales_under_their_own_names(tmp_path, tokenized):
    callback = generation(cfg_scales=[1.0, 3.0], every_n_steps=0)
    make_trainer(tmp_path, callback, max_steps=1).fit(tokenized(), codes())
    name = TinyFeatures().name
    assert callback.metrics[f"gen/cfg1.0/fid_{name}"] != callback.metrics[f"gen/cfg3.0/fid_{name}"]


def test_generation_without_a_tokenizer_fails_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"task\.tokenizer_ckpt"):
        make_trainer(tmp_path, generation(), max_steps=1).fit(make_gpt_task(), codes())


def test_training_is_the_same_bit_for_bit_with_and_without_generation(tmp_path, tokenized):
    def losses(*callbacks) -> list[str]:
        watch = Losses()
        task = tokenized()
        make_trainer(tmp_path, StepSeed(seed=0), EMA(decay=0.5), watch, *callbacks, max_steps=5).fit(task, codes())
        return watch.values

    assert losses() == losses(generation())


def test_reconstruction_measures_and_training_is_the_same_with_it(tmp_path):
    def run(*callbacks) -> tuple[list[str], L.Trainer]:
        torch.manual_seed(0)
        watch = Losses()
        trainer = make_trainer(
            tmp_path, StepSeed(seed=0), EMA(decay=0.5), watch, *callbacks, max_steps=4, val_check_interval=2
        )
        trainer.fit(make_tokenizer_task(), make_images())
        return watch.values, trainer

    plain, _ = run()
    measured, trainer = run(Reconstruction(features=TinyFeatures(), sheet_pairs=3))
    assert plain == measured
    values = trainer.callback_metrics
    assert 0 < values["val/codebook_usage"] <= 1
    assert 0 < values["val/psnr"] < 60
    assert f"val/rfid_{TinyFeatures().name}" in values
    assert len(list((tmp_path / "sheets/reconstruction").iterdir())) == 2


def test_progress_and_throughput_count_steps(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, StepProgress(line_every=0.0), Throughput(window=2), max_steps=4, enable_progress_bar=True
    )
    trainer.fit(make_tokenizer_task(), make_images())
    assert "4/4 steps" in capsys.readouterr().err
    assert trainer.callback_metrics["train/images_per_second"] > 0
