import time

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smalto.callbacks.progress import StepProgress
from smalto.callbacks.throughput import Throughput
from tiny_tasks import make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer

KEYS = {"images_per_second", "codes_per_second", "tflops_per_second", "mfu", "memory_peak_gb"}


def test_every_window_is_logged_and_the_last_step(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="log", version=0)
    bar = StepProgress(line_every=0.0)
    trainer = make_trainer(
        tmp_path, bar, Throughput(window=2), max_steps=5, enable_progress_bar=True, logger=logger, log_every_n_steps=3
    )
    trainer.fit(make_gpt_task(), make_codes())
    found = trainer.callback_metrics
    assert {f"train/{key}" for key in KEYS} <= found.keys()
    assert found["train/codes_per_second"] == pytest.approx(16 * float(found["train/images_per_second"]))
    assert 0.05 < found["train/memory_peak_gb"] < 100
    assert "images_per_second=" in capsys.readouterr().err
    rows = (tmp_path / "log/version_0/metrics.csv").read_text()
    header, *lines = (line.split(",") for line in rows.splitlines())
    place = header.index("train/mfu")
    steps = [line[header.index("step")] for line in lines if line[place]]
    assert steps == ["2", "4", "5"]


def test_mfu_is_the_share_of_the_peak(tmp_path):
    task = make_gpt_task()
    trainer = make_trainer(tmp_path, Throughput(window=2, peak_tflops=0.5), max_steps=4)
    trainer.fit(task, make_codes())
    found = trainer.callback_metrics
    rate = float(found["train/images_per_second"])
    assert float(found["train/mfu"]) == pytest.approx(rate * task.training_flops / 0.5e12, rel=1e-5)
    assert float(found["train/tflops_per_second"]) == pytest.approx(rate * task.training_flops / 1e12, rel=1e-5)


class Pause(L.Callback):
    """What pictures and checkpoints do: they take their time after a batch, or in validation."""

    def __init__(self, hook: str, seconds: float) -> None:
        setattr(self, hook, lambda *args: time.sleep(seconds))


@pytest.mark.parametrize(
    ("hook", "counts"), [("on_train_batch_start", False), ("on_train_batch_end", False), ("on_validation_start", False)]
)
def test_pauses_of_other_callbacks_do_not_count(tmp_path, hook, counts):
    trainer = make_trainer(
        tmp_path, Throughput(window=4, peak_tflops=1.0), Pause(hook, 0.3), max_steps=4, val_check_interval=2
    )
    trainer.fit(make_gpt_task(), make_codes())
    pauses = 2 * 0.3  # or four of them: a busy machine takes long, but not so long, for four tiny steps
    assert (4 * 8 / float(trainer.callback_metrics["train/images_per_second"]) < pauses) != counts


def test_waiting_for_data_counts(tmp_path):
    data = make_codes()
    fetch = data.fetch_train
    data.fetch_train = lambda *args: (time.sleep(0.1), fetch(*args))[1]
    trainer = make_trainer(tmp_path, Throughput(window=4, peak_tflops=1.0), max_steps=4)
    trainer.fit(make_gpt_task(), data)
    assert 4 * 8 / float(trainer.callback_metrics["train/images_per_second"]) > 0.2


@pytest.mark.parametrize("wrong", [{"window": 0}, {"peak_tflops": "abacus"}])
def test_wrong_settings_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"must be at least 1|known devices are"):
        Throughput(**wrong)


@pytest.mark.parametrize("kind", ["gpt", "tokenizer", "tokenizer with discriminator"])
def test_flops_are_those_that_run(kind):
    """Forward and backward on the real device; first layers of convolutional nets need no gradient for their input."""
    if kind == "gpt":
        task = make_gpt_task()
        batch = {"codes": torch.zeros(2, 16, dtype=torch.int64), "label": torch.zeros(2, dtype=torch.int64)}
    else:
        task = make_tokenizer_task()
        batch = {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}
    task.configure_model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if kind == "gpt":
            task._loss(batch)[0].backward()
        else:
            adversarial = kind != "tokenizer"
            image = task._image(batch)
            rebuilt, losses = task.generator_losses(image, adversarial=adversarial)
            losses["loss"].backward()
            if adversarial:
                task.disc_loss(task.discriminator(image), task.discriminator(rebuilt.detach())).backward()
    flops = task.training_flops if kind == "gpt" else task.flops(adversarial=kind != "tokenizer")
    assert 2 * flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_flops_are_counted_once_and_again_when_the_discriminator_comes(tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(
        "smalto.tasks.tokenizer.forward_flops", lambda net, *images: (counted.append(type(net).__name__), 1)[1]
    )
    trainer = make_trainer(tmp_path, Throughput(window=1, peak_tflops=1.0), max_steps=8)
    trainer.fit(make_tokenizer_task(disc_start=3), make_images())
    assert counted == ["VQModel", "VQModel", "PatchDiscriminator"]
    assert float(trainer.callback_metrics["train/tflops_per_second"]) > 0
