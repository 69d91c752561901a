"""Two processes on the CPU: the same training as one process, started by torchrun or by Lightning."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.chain

COMMON = [
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=4",
    "callbacks=_common",
    "callbacks.checkpoint.every_n_steps=4",
]
GPT = [
    *COMMON,
    "task=gpt",
    "data=synthetic_codes",
    "image_size=64",
    "model.dim=32",
    "model.num_layers=1",
    "model.num_heads=2",
    # ranks draw their own dropout, so equality with one process needs none
    "ablation=no_dropout",
    "model.conditioner.drop_prob=0",
    "model.conditioner.num_classes=4",
    "tokenizer.quantizer.codebook_size=32",
    "data.num_classes=4",
    "data.num_train=32",
    "data.num_val=10",
    "data.batch_size=4",
]
TOKENIZER = [
    *COMMON,
    "task=tokenizer",
    "data=synthetic_images",
    "image_size=32",
    "perceptual=none",
    "tokenizer=demo",
    "tokenizer.base_channels=8",
    "tokenizer.quantizer.codebook_size=32",
    "discriminator.num_layers=1",
    "task.disc_start=2",
    "data.num_train=32",
    "data.num_val=8",
    "data.batch_size=4",
]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def metrics(folder, *arguments: str, launcher: list[str] | None = None) -> dict[str, float]:
    environment = {**os.environ, "SMALTO_OUTPUTS": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("SMALTO_LAUNCHED_AT", None)
    command = [sys.executable, *(launcher or []), "-m", "smalto", "train", *arguments]
    # a session of its own: if a rank hangs, all of them are killed
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        text, _ = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        raise
    assert process.returncode == 0, text[-3000:]
    runs = list(folder.glob("train/*"))
    assert len(runs) == 1, "processes of one run must agree on its folder"
    assert (runs[0] / "config.yaml").exists()
    return json.loads((runs[0] / "metrics.json").read_text())


def test_two_processes_train_what_one_trains(tmp_path):
    one = metrics(tmp_path / "one", *GPT)
    two = metrics(tmp_path / "two", *GPT, "strategy=ddp", "trainer.devices=2", launcher=TORCHRUN)
    # the sum over the batch is taken in another order
    assert two["val/loss"] == pytest.approx(one["val/loss"], abs=1e-5)
    assert two["val/accuracy"] == pytest.approx(one["val/accuracy"], abs=1e-6)
    assert len(list((tmp_path / "two").glob("train/*/checkpoints/step_*"))) == 1


def test_discriminator_that_starts_late_runs_under_ddp(tmp_path):
    found = metrics(tmp_path / "two", *TOKENIZER, "strategy=ddp", "trainer.devices=2")
    assert "train/disc_loss" in found
