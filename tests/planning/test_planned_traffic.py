"""Planned bytes of a step against arithmetic by hand and against what two gloo processes really exchange."""

from functools import partial

import pytest
import torch

from exchanged_bytes import SETTINGS, STEPS, exchanged_bytes, make_task
from smalto.planning.outline import build_outline
from smalto.planning.traffic import batch_bytes, ddp_traffic, fsdp_traffic, logged_numbers
from tiny_tasks import make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer


def outlined(task):
    build_outline(task)
    return task


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    return exchanged_bytes(tmp_path_factory.mktemp("exchanged"))


def test_ddp_exchanges_what_is_planned(exchanged):
    planned = ddp_traffic(outlined(make_task()), devices=2, precision="32-true")
    # A ring of two sends half of it to be summed, and half of the sums.
    assert exchanged["ddp"] == [STEPS * planned.gradients] * 2


@pytest.mark.parametrize(
    "number", range(len(SETTINGS)), ids=lambda number: "-".join(map(str, SETTINGS[number].values()))
)
def test_fsdp_exchanges_what_is_planned(exchanged, number):
    planned = fsdp_traffic(outlined(make_task()), devices=2, **SETTINGS[number])
    for gathered, reduced in exchanged["fsdp"][number]:
        assert (gathered, reduced) == (2 * STEPS * planned.weights, 2 * STEPS * planned.gradients)


def test_by_hand():
    task = outlined(make_gpt_task())
    # 32 codes and 4 classes of 32, output 32 x 32; a block: qkv 96 x 32, proj 32 x 32, 3 of 96 x 32, two norms; a norm
    block, root = 3 * 1024 + 1024 + 3 * 96 * 32 + 64, (32 + 4 + 32 + 1) * 32
    assert sum(p.numel() for p in task.net.parameters()) == 2 * block + root
    ddp = ddp_traffic(task, devices=8, precision="bf16-mixed", buffers=100)
    assert (ddp.weights, ddp.gradients, ddp.buffers) == (0, 2 * 4 * (2 * block + root) * 7 // 8, 100)
    assert ddp.total == ddp.gradients + 100
    for precision, gather, reduce in (("bf16-mixed", 2, 4), ("16-mixed", 4, 4), ("bf16-true", 2, 2)):
        fsdp = fsdp_traffic(task, devices=2, precision=precision, accumulate=3, reduce_once=True)
        assert fsdp.weights == 3 * gather * (2 * 2 * block + root) // 2  # blocks twice, the root once
        assert fsdp.gradients == reduce * (2 * block + root) // 2
    assert ddp_traffic(task, devices=1, precision="32-true").total == 0
    assert fsdp_traffic(task, devices=1, precision="32-true", accumulate=1, reduce_once=True).total == 0
    assert batch_bytes(task, 5) == 5 * (16 * 8 + 8)


def test_each_network_of_a_tokenizer_is_reduced_once():
    task = outlined(make_tokenizer_task())
    parameters = sum(p.numel() for net in (task.net, task.discriminator) for p in net.parameters())
    assert ddp_traffic(task, devices=2, precision="32-true").gradients == 4 * parameters
    assert batch_bytes(task, 5) == 5 * 3 * 16 * 16


@pytest.mark.parametrize("make", [make_gpt_task, make_tokenizer_task, partial(make_tokenizer_task, discriminator=None)])
def test_the_losses_that_are_logged_are_counted(make, tmp_path):
    task, data = make(), make_codes() if make is make_gpt_task else make_images()
    trainer = make_trainer(tmp_path, max_steps=10, limit_val_batches=0)
    trainer.fit(task, data)
    found = {name for name in trainer.callback_metrics if name.startswith("train/")} - {"train/lr"}
    assert logged_numbers(task) == len(found), found
    assert all(torch.is_tensor(trainer.callback_metrics[name]) for name in found)
