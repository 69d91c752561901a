"""The average of ``task.net``: what it is, when it moves, and that training never sees it."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from smalto.callbacks.ema import EMA, averaged_weights
from smalto.tasks.checkpoint import EMA_KEY


class Task(L.LightningModule):
    """A line fitted by gradient descent, beside a network that is no concern of the average."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.discriminator = nn.Linear(2, 1)
        self.history: list[Tensor] = []
        self.validated: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.net(batch[0]) - 1).pow(2).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(self.net.weight.detach().clone())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.history.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def fit(task: Task, ema: EMA, *, epochs: int = 1, ckpt_path: Path | None = None, **settings: Any) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    points = torch.randn(24, 2, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(points), batch_size=4)
    trainer.fit(task, loader, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def started(net: nn.Module, **settings: Any) -> EMA:
    ema = EMA(**settings)
    ema.on_fit_start(SimpleNamespace(), SimpleNamespace(net=net))
    return ema


def walk(net: nn.Module, ema: EMA, steps: int) -> list[dict[str, Tensor]]:
    """Move the weights at random, averaging after every move; the weights after each."""
    path = []
    for _ in range(steps):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.randn_like(p))
        ema.update(net)
        path.append(weights(net))
    return path


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def test_closed_form(net):
    ema, first = started(net, decay=0.9, warmup=False), weights(net)
    path = walk(net, ema, 20)
    for name, average in ema.shadow.items():
        expected = 0.9**20 * first[name].double()
        expected += sum(0.1 * 0.9 ** (19 - k) * step[name].double() for k, step in enumerate(path))
        # Twenty float32 updates of values below 10.
        torch.testing.assert_close(average.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.999])
def test_warmup_forgets_the_start(net, decay):
    ema = started(net, decay=decay)
    expected = {name: p.double() for name, p in weights(net).items()}
    for n, step in enumerate(walk(net, ema, 15)):
        d = min(decay, (1 + n) / (10 + n))
        expected = {name: d * value + (1 - d) * step[name].double() for name, value in expected.items()}
    for name, average in ema.shadow.items():
        torch.testing.assert_close(average.double(), expected[name], atol=1e-5, rtol=0)


def test_average_of_weights_at_rest_is_exact(net):
    ema = started(net)
    for _ in range(5):
        ema.update(net)
    assert all(torch.equal(ema.shadow[name], value) for name, value in weights(net).items())


def test_average_is_float32_and_of_parameters_only(net):
    ema = started(net.bfloat16())
    assert ema.shadow.keys() == dict(net.named_parameters()).keys()
    assert {value.dtype for value in ema.shadow.values()} == {torch.float32}


def test_swapping_in_and_out_restores_every_bit(net):
    ema = started(net)
    walk(net, ema, 3)
    live = weights(net)
    with ema.applied(net):
        assert all(torch.equal(value, ema.shadow[name]) for name, value in weights(net).items())
    assert all(torch.equal(value, live[name]) for name, value in weights(net).items())


def test_nested_use_swaps_once(net):
    ema = started(net)
    walk(net, ema, 3)
    live, module = weights(net), SimpleNamespace(net=net)
    ema.on_validation_start(SimpleNamespace(), module)
    with ema.applied(net), ema.applied(net):
        pass
    assert all(torch.equal(value, ema.shadow[name]) for name, value in weights(net).items())
    ema.on_validation_end(SimpleNamespace(), module)
    assert all(torch.equal(value, live[name]) for name, value in weights(net).items())


def test_an_error_inside_restores_the_weights(net):
    ema = started(net)
    walk(net, ema, 2)
    live = weights(net)
    with pytest.raises(KeyError), ema.applied(net):
        raise KeyError
    assert all(torch.equal(value, live[name]) for name, value in weights(net).items())
    ema.on_validation_start(SimpleNamespace(), SimpleNamespace(net=net))
    ema.on_exception(SimpleNamespace(), SimpleNamespace(net=net), KeyError())
    assert all(torch.equal(value, live[name]) for name, value in weights(net).items())


def test_state_goes_on_exactly(net):
    ema = started(net)
    walk(net, ema, 4)
    file = io.BytesIO()
    torch.save(ema.state_dict(), file)
    file.seek(0)
    resumed = EMA()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.on_fit_start(SimpleNamespace(), SimpleNamespace(net=net))
    with torch.no_grad():
        net[0].weight.mul_(3)
    ema.update(net)
    resumed.update(net)
    assert resumed.num_updates == ema.num_updates == 5
    assert all(torch.equal(resumed.shadow[name], value) for name, value in ema.shadow.items())


def test_averaged_weights_of_a_run(net):
    ema = started(net)
    walk(net, ema, 2)
    live = weights(net)
    for callbacks, expected in (([ema], ema.shadow), ([], live)):
        with averaged_weights(SimpleNamespace(callbacks=callbacks), net):
            assert all(torch.equal(value, expected[name]) for name, value in weights(net).items())
    assert all(torch.equal(value, live[name]) for name, value in weights(net).items())


@pytest.mark.parametrize("accumulate", [1, 3])
def test_moves_once_per_optimizer_step(accumulate):
    task, ema = Task(), EMA(decay=0.8)
    trainer = fit(task, ema, accumulate_grad_batches=accumulate)
    assert ema.num_updates == trainer.global_step == 6 // accumulate


def test_a_run_validates_the_average_and_trains_the_weights():
    task, ema = Task(), EMA(decay=0.8, warmup=False)
    start = task.net.weight.detach().clone()
    trainer = fit(task, ema)
    expected = start
    for value in task.history:
        expected = 0.8 * expected + 0.2 * value
    torch.testing.assert_close(ema.shadow["weight"], expected)
    assert ema.shadow.keys() == {"weight", "bias"}, "the net only, not the discriminator"
    assert torch.equal(task.validated[-1], ema.shadow["weight"])
    assert torch.equal(task.net.weight, task.history[-1])
    assert not torch.equal(task.net.weight, ema.shadow["weight"])
    assert trainer.callbacks[0] is ema


def test_checkpoint_holds_both_weights(tmp_path):
    task, ema = Task(), EMA(decay=0.8)
    trainer = fit(task, ema)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["net.weight"], task.net.weight)
    assert torch.equal(checkpoint["callbacks"][EMA_KEY]["shadow"]["weight"], ema.shadow["weight"])
    assert checkpoint["callbacks"][EMA_KEY]["num_updates"] == 6


def test_a_resumed_run_averages_as_an_unbroken_one(tmp_path):
    tasks = Task(), Task()
    tasks[1].load_state_dict(tasks[0].state_dict())
    unbroken, before, after = EMA(decay=0.8), EMA(decay=0.8), EMA(decay=0.8)
    fit(tasks[0], unbroken, epochs=2)
    fit(tasks[1], before).save_checkpoint(tmp_path / "x.ckpt")
    fit(Task(), after, epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert after.num_updates == 12
    assert all(torch.equal(after.shadow[name], value) for name, value in unbroken.shadow.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_refuses_what_is_no_decay(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        EMA(decay=decay)
