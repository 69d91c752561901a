"""Float32 is float32: what is measured uses no tensor cores, whatever training allows."""

import sys

import lightning as L
import pytest
import torch

from smalto.callbacks.validation import Validation
from smalto.nn.tf32 import set_tf32, tf32_allowed, without_tf32
from tiny_tasks import make_codes, make_gpt_task, make_trainer


@pytest.fixture(autouse=True)
def _as_before():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_both_kinds_of_products_are_set_together():
    set_tf32(True)
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    with without_tf32():
        assert not tf32_allowed()
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    set_tf32(False)
    assert not tf32_allowed()


def test_convolutions_may_use_it_until_a_command_forbids_it(monkeypatch, tmp_path):
    """torch's own default, and the reason for all this."""
    torch.backends.cudnn.allow_tf32 = True
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["smalto", "experiment=demo_gpt", "device=h100"])
    from smalto import plan

    plan.main()
    assert not tf32_allowed()


def test_validation_does_without(tmp_path):
    seen = []

    class Seen(L.Callback):
        def on_train_batch_start(self, *args):
            seen.append(("train", tf32_allowed()))

        def on_validation_batch_start(self, *args):
            seen.append(("val", tf32_allowed()))

    set_tf32(True)
    trainer = make_trainer(tmp_path, Validation(tmp_path), Seen(), max_steps=3, val_check_interval=2)
    trainer.fit(make_gpt_task(), make_codes())
    assert set(seen) == {("train", True), ("val", False)}
    assert tf32_allowed()
