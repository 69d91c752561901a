"""Two processes on the CPU: the same training as one process, started by Lightning or by torchrun."""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from smalto import convert
from smalto.runtime import compose
from smalto.tasks.checkpoint import network_state, read_checkpoint
from tiny_tasks import TINY_GPT

pytestmark = pytest.mark.chain

COMMON = [
    "logger=csv",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "callbacks=_common",
    "callbacks.checkpoint.keep=0",
    "callbacks.throughput.peak_tflops=1",
]
GPT = [
    *COMMON,
    *TINY_GPT,
    "trainer.max_steps=20",
    "trainer.val_check_interval=20",
    "callbacks.checkpoint.every_n_steps=10",
    "task.optimizer.lr=1e-2",
    "model.num_layers=2",
    # ranks draw their own dropout, so equality with one process needs none
    "ablation=no_dropout",
    "model.conditioner.drop_prob=0",
    "data.num_train=32",
    "data.num_val=10",
]
TOKENIZER = [
    *COMMON,
    "trainer.max_steps=10",
    "trainer.val_check_interval=10",
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
TWO = ["trainer.devices=2"]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


def train(folder: Path, *arguments: str) -> Path:
    """The folder of a run, the only one that its processes made; ``ddp`` is started by torchrun."""
    environment = {**os.environ, "SMALTO_OUTPUTS": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("SMALTO_LAUNCHED_AT", None)
    launcher = TORCHRUN if "strategy=ddp" in arguments else []
    command = [sys.executable, *launcher, "-m", "smalto", "train", *arguments]
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
    (run,) = folder.glob("train/*")
    assert (run / "config.yaml").exists()
    return run


def curve(folder: Path, key: str) -> list[float]:
    """Values of a metric, one per step."""
    with (folder / "logs/metrics.csv").open() as lines:
        return [float(row[key]) for row in csv.DictReader(lines) if row.get(key)]


def together(jobs: dict[str, list[str]], folder: Path) -> dict[str, Path]:
    """Folders of runs, two at a time: most of their time is that of imports."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(lambda name: train(folder / name, *jobs[name]), jobs), strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = together(
        {
            "fsdp": [*GPT, *TWO, "strategy=fsdp"],
            "ddp": [*GPT, *TWO, "strategy=ddp"],
            "one": GPT,
            "tokenizer_one": TOKENIZER,
            "tokenizer_ddp": [*TOKENIZER, *TWO, "strategy=ddp"],
        },
        folder,
    )
    start = f"ckpt_path={first['fsdp']}/checkpoints/step_00000010.ckpt"
    then = {"again_one": [*GPT, start], "again_ddp": [*GPT, *TWO, "strategy=ddp", start]}
    return first | together(then, folder)


def test_losses_are_those_of_one_process(runs):
    one, ddp, fsdp = (curve(runs[name], "train/loss") for name in ("one", "ddp", "fsdp"))
    assert len(one) == 20
    assert one[0] - one[-1] > 0.5, "nothing was learned, so nothing is compared"
    assert ddp == pytest.approx(one, abs=1e-5)  # the sum over the batch is taken in another order
    assert fsdp == pytest.approx(one, abs=1e-5)
    assert fsdp == pytest.approx(ddp, abs=1e-6)
    metrics = [json.loads((runs[name] / "metrics.json").read_text()) for name in ("one", "ddp", "fsdp")]
    for key in ("val/loss", "val/accuracy"):
        assert [values[key] for values in metrics] == pytest.approx([metrics[0][key]] * 3, abs=1e-5)


@pytest.mark.parametrize("name", ["again_one", "again_ddp"])
def test_a_sharded_run_goes_on_under_another_strategy(runs, name):
    assert curve(runs[name], "train/loss") == pytest.approx(curve(runs["fsdp"], "train/loss")[10:], abs=1e-6)


def test_a_sharded_checkpoint_is_exported_bit_for_bit(runs, tmp_path):
    sharded = runs["fsdp"] / "checkpoints/last.ckpt"
    assert sharded.resolve().is_dir()
    convert.run(compose("convert", [f"in={sharded}", f"out={tmp_path}/out.ckpt", "weights=model"]))
    exported, state = (network_state(read_checkpoint(p), ema=False) for p in (tmp_path / "out.ckpt", sharded))
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[name], value) for name, value in state.items())


def test_a_tokenizer_with_its_discriminator_is_that_of_one_process(runs):
    for key, steps in (("rec_loss", 10), ("loss", 10), ("disc_loss", 8), ("gen_loss", 8)):
        one, two = (curve(runs[name], f"train/{key}") for name in ("tokenizer_one", "tokenizer_ddp"))
        assert len(one) == steps
        assert two == pytest.approx(one, abs=1e-4), key
