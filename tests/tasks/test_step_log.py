import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger

from forked_ranks import run_ranks
from smalto.callbacks.gradient_guard import GradientGuard
from smalto.tasks.step_log import StepLog
from tiny_tasks import make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer


class Rows(DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict] = {}

    def log_metrics(self, metrics, step=None) -> None:
        self.rows.setdefault(step, {}).update(metrics)


class Losses(L.Callback):
    """What each step computed."""

    def __init__(self) -> None:
        self.seen: dict[int, dict] = {}

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        noted = {**pl_module.step_log._mean, **pl_module.step_log._own}
        # The batch that made the step, not those after it that are accumulated for the next one.
        self.seen.setdefault(trainer.global_step, {name: float(value) for name, value in noted.items()})


class Stop(L.Callback):
    """Ends the run at a step that nobody could know before."""

    def on_train_batch_end(self, trainer, *args) -> None:
        trainer.should_stop = trainer.global_step == 4


def fit(folder, kind, *callbacks, **settings):
    task, data = (make_gpt_task(), make_codes()) if kind == "gpt" else (make_tokenizer_task(), make_images())
    rows, losses = Rows(), Losses()
    trainer = make_trainer(folder, losses, GradientGuard(), *callbacks, logger=rows, **settings)
    trainer.fit(task, data)
    return trainer, rows.rows, losses.seen


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_rows_are_the_values_of_their_step_bit_for_bit(tmp_path, kind):
    trainer, rows, seen = fit(tmp_path, kind, log_every_n_steps=2, max_steps=6)
    assert rows.keys() == {1, 3, 5}  # Lightning counts from 0
    for step, row in rows.items():
        found = {name: value for name, value in row.items() if name.startswith("train/") and name != "train/lr"}
        assert found == {name: value for name, value in seen[step + 1].items() if name != "train/lr"}
        assert row["train/lr"] == pytest.approx(seen[step + 1]["train/lr"], rel=1e-6)
        assert {"train/loss", "train/grad_norm", "train/skipped_steps"} <= found.keys()
    assert float(trainer.callback_metrics["train/loss"]) == seen[6]["train/loss"]


def test_the_last_step_and_one_that_ends_the_run_are_read(tmp_path):
    trainer, rows, seen = fit(tmp_path, "gpt", log_every_n_steps=50, max_steps=5)
    assert not rows
    assert float(trainer.callback_metrics["train/loss"]) == seen[5]["train/loss"]
    trainer, rows, seen = fit(tmp_path, "gpt", Stop(), log_every_n_steps=50, max_steps=9)
    assert rows[3]["train/loss"] == seen[4]["train/loss"]


def test_rows_of_accumulated_steps(tmp_path):
    _, rows, seen = fit(tmp_path, "gpt", log_every_n_steps=1, max_steps=3, accumulate_grad_batches=2)
    assert {step: row["train/loss"] for step, row in rows.items()} == {n: seen[n + 1]["train/loss"] for n in range(3)}


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_other_steps_neither_log_nor_fetch(tmp_path, monkeypatch, kind):
    """The guard fetches at its own interval, which does not come here."""
    calls = []
    log = L.LightningModule.log
    monkeypatch.setattr(
        L.LightningModule, "log", lambda task, name, *a, **k: (calls.append(name), log(task, name, *a, **k))[1]
    )
    read = StepLog.read
    monkeypatch.setattr(StepLog, "read", lambda self: (calls.append("read"), read(self))[1])
    fit(tmp_path, kind, log_every_n_steps=50, max_steps=4, limit_val_batches=0)
    assert calls.count("read") == 1
    assert calls.count("train/loss") == 1


def test_numbers_never_go_to_the_device_and_values_come_back_in_one_piece(monkeypatch):
    log, moved = StepLog(), []
    log.note(
        {"loss": torch.tensor(0.1, requires_grad=True), "half": torch.tensor(0.5, dtype=torch.bfloat16), "lr": 0.1}
    )
    log.note({"skipped": torch.tensor(1 / 3, dtype=torch.float64)}, mean=False)
    assert not log._mean["loss"].requires_grad
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (moved.append(self.shape), to_cpu(self))[1])
    found = log.read()
    assert moved == [(3,)]
    assert found["loss"] == torch.tensor(0.1)
    assert found["lr"].dtype == found["half"].dtype == torch.float32
    assert float(found["skipped"]) == 1 / 3


def test_values_are_the_mean_over_processes_and_own_ones_are_left_alone():
    def read(rank: int) -> dict:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        log = StepLog()
        names = ["a", "b"] if rank else ["b", "a"]  # noted in another order
        log.note({name: torch.tensor(float(rank + 10 * (name == "b"))) for name in names} | {"lr": 0.5})
        log.note({"own": torch.tensor(float(rank))}, mean=False)
        return {name: float(value) for name, value in log.read().items()}

    first, second = run_ranks(read, 2)
    assert first == {"a": 0.5, "b": 10.5, "own": 0.0, "lr": 0.5}
    assert second == first | {"own": 1.0}


def test_one_log_per_trainer(tmp_path):
    trainer, task = make_trainer(tmp_path, max_steps=2), make_gpt_task()
    trainer.fit(task, make_codes())
    trainer.validate(task, make_codes(), verbose=False)
    assert [type(callback) for callback in trainer.callbacks].count(StepLog) == 1
