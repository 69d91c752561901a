"""The check itself on the CPU, where it must say that all is well; on a GPU, the same as tests."""

import json

import pytest
import torch

from gpu_check import __main__ as program
from gpu_check import checks
from gpu_check.runs import Failed, Runs, furthest
from gpu_check.table import ABSENT, BAD, Row, judged, markdown
from smalto.callbacks.ema import EMA
from smalto.callbacks.gradient_guard import GradientGuard
from smalto.callbacks.step_seed import StepSeed
from tiny_tasks import make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer

QUICK = ("golden", "training", "synchronisations", "resuming", "evaluation", "sampling")


@pytest.mark.chain
def test_all_is_well_on_the_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "CHECKS", [check for check in checks.CHECKS if check.__name__ in QUICK])
    file = tmp_path / "report.json"
    assert program.main("cpu", file) == 0, capsys.readouterr().out
    rows = {row["what"]: row for row in json.loads(file.read_text())}
    assert {row["verdict"] for row in rows.values()} <= {"ok", ABSENT}
    assert rows["gpt: float32 losses of 20 steps"]["value"] == "0.0e+00 from the CPU's"
    assert rows["gpt: losses after resuming"]["value"] == "the same bit by bit"
    assert rows["samples_fp32: pictures"]["value"].startswith("16 of 16")


def test_a_check_that_breaks_is_a_row(tmp_path):
    def breaks(runs):
        yield judged("first", "seen", good=True)
        raise Failed("no more")

    rows = program.looked_at(breaks, Runs(tmp_path, torch.device("cpu")))
    assert [row.verdict for row in rows] == ["ok", BAD]
    assert "no more" in rows[1].value
    assert "| first" in markdown(rows)


def test_without_a_gpu_the_way_out_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main("cuda", tmp_path / "report.json") == 2
    assert "DEVICE=cpu" in capsys.readouterr().err


def test_losses_of_other_steps_are_far():
    assert furthest({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.2}) == pytest.approx(0.1)
    assert furthest({0: 1.0}, {1: 1.0}) == furthest({}, {}) == float("inf")


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("gpu"), torch.device("cuda"))
    runs.prepare()
    return runs


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("check", checks.CHECKS, ids=lambda check: check.__name__)
def test_check_on_gpu(check, on_gpu):
    rows: list[Row] = program.looked_at(check, on_gpu)
    assert [row for row in rows if row.verdict == BAD] == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_a_step_waits_for_nothing(tmp_path, kind, precision):
    class Strict(StepSeed):
        """Around a batch and what other callbacks do with it, but for the first steps, in which memory is taken."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            torch.cuda.set_sync_debug_mode("error" if batch_idx > 2 else "default")

        def on_train_batch_end(self, *args):
            torch.cuda.set_sync_debug_mode("default")

    fused = torch.optim.AdamW
    task = (make_gpt_task if kind == "gpt" else make_tokenizer_task)(
        optimizer=lambda groups: fused(groups, lr=1e-3, fused=True)
    )
    callbacks = (EMA(decay=0.9), GradientGuard(patience=100), Strict(seed=0))
    trainer = make_trainer(
        tmp_path, *callbacks, accelerator="gpu", precision=precision, max_steps=8, log_every_n_steps=100
    )
    trainer.fit(task, datamodule=make_codes() if kind == "gpt" else make_images())
    assert trainer.global_step == 8
