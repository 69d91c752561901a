"""Behaviour over time of tokenizer training: what steps, when, and what a resumed run does."""

from collections.abc import Callable
from contextlib import nullcontext

import lightning as L
import pytest
import torch

from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.ema import EMA
from smalto.callbacks.step_seed import StepSeed
from smalto.sampling.engine import EngineConfig
from smalto.tasks.optim import Schedule
from tiny_tasks import make_images, make_tokenizer_task, make_trainer


class Watch(L.Callback):
    """Copies of the discriminator's whole state before each step, and the losses."""

    def __init__(self) -> None:
        self.states: list[dict] = []
        self.losses: list[str] = []
        self.gradients: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.discriminator is not None:
            state = pl_module.discriminator.state_dict()
            self.states.append({key: value.clone() for key, value in state.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(pl_module.step_log.read()["train/loss"]).hex())
        if pl_module.discriminator is not None:
            self.gradients.append(any(p.grad is not None for p in pl_module.discriminator.parameters()))


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_discriminator_does_not_exist_for_the_model_before_its_start(tmp_path):
    watch = Watch()
    task = make_tokenizer_task(disc_start=3)
    make_trainer(tmp_path, watch).fit(task, make_images())
    # weights and running statistics alike; state i is before step i
    assert all(equal(watch.states[0], state) for state in watch.states[1:4])
    assert not equal(watch.states[3], watch.states[4])
    assert watch.gradients == [False, False, False, True, True, True]


def test_the_start_does_not_change_the_steps_before_it(tmp_path):
    early, never = Watch(), Watch()
    make_trainer(tmp_path, early, StepSeed(seed=0)).fit(make_tokenizer_task(disc_start=3), make_images())
    torch.manual_seed(0)
    make_trainer(tmp_path, never, StepSeed(seed=0)).fit(make_tokenizer_task(disc_start=100), make_images())
    assert early.losses[:3] == never.losses[:3]
    assert early.losses[3] != never.losses[3]


def test_global_step_counts_generator_steps_only(tmp_path):
    watch = Watch()
    trainer = make_trainer(tmp_path, watch)
    trainer.fit(make_tokenizer_task(disc_start=2), make_images())
    assert trainer.global_step == 6
    assert len(watch.losses) == 6, "max_steps must not be reached early because the discriminator steps too"


@pytest.mark.parametrize(
    "overrides",
    [
        {"discriminator": None},
        {"discriminator": {}},
        {"adaptive_disc_weight": True},
        {"reconstruction_loss": "l1", "gen_loss": "non_saturating", "disc_loss": "non_saturating"},
        {"disc_loss": "vanilla", "gradient_clip": 0.0},
        {"perceptual": lambda: Stub(), "perceptual_weight": 0.5},
    ],
)
def test_options_train(tmp_path, overrides):
    trainer = make_trainer(tmp_path, max_steps=5)
    trainer.fit(make_tokenizer_task(**overrides), make_images())
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    if "perceptual" in overrides:
        assert "train/perceptual_loss" in trainer.callback_metrics


class Stub(torch.nn.Module):
    """A perceptual loss without a network."""

    name = "lpips_stub"

    def forward(self, x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))


def test_learns_to_rebuild(tmp_path):
    def error(steps: int) -> float:
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, max_steps=steps)
        trainer.fit(make_tokenizer_task(discriminator=None, schedule=Schedule()), make_images())
        return float(trainer.callback_metrics["train/rec_loss"])

    assert error(60) < 0.5 * error(1)


@pytest.mark.parametrize("key", ["reconstruction_loss", "disc_loss", "gen_loss"])
def test_unknown_loss_is_refused(key):
    with pytest.raises(ValueError, match=key):
        make_tokenizer_task(**{key: "l3"})


def run(folder, steps: int, *, stop_at: int | None = None, data: Callable = make_images) -> tuple[list[str], dict]:
    """Train to ``steps``, dying at ``stop_at``, going on from what is in ``folder``; losses and final state."""

    class Die(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == stop_at:
                raise RuntimeError("killed")

    torch.manual_seed(1)
    watch, average = Watch(), EMA(decay=0.9)
    saver = LatestCheckpoint(dirpath=folder, every_n_steps=2)
    trainer = make_trainer(folder, StepSeed(seed=0), average, watch, Die(), saver, max_steps=steps)
    task = make_tokenizer_task()
    found = sorted(folder.glob("step_*.ckpt"))
    dies = pytest.raises(RuntimeError, match="killed") if stop_at is not None else nullcontext()
    with dies:
        trainer.fit(task, data(), ckpt_path=found[-1] if found else None, weights_only=True)
    return watch.losses, {**task.state_dict(), **{f"ema.{k}": v for k, v in average.shadow.items()}}


@pytest.mark.parametrize("stop_at", [3, 5, 8])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, stop_at):
    whole, final = run(tmp_path / "whole", 10)
    before, _ = run(tmp_path / "broken", 10, stop_at=stop_at)
    after, resumed = run(tmp_path / "broken", 10)
    start = stop_at - stop_at % 2
    assert before == whole[:stop_at]
    assert after == whole[start:]
    assert resumed.keys() == final.keys()
    assert all(torch.equal(final[key], resumed[key]) for key in final)


def test_reconstructions_are_decoded_as_the_engine_says_and_codes_stay(generator):
    task = make_tokenizer_task()
    task.configure_model()
    task.eval()
    task.to_pixels = lambda picture: picture
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    exact, codes = task.reconstruct(image)
    with torch.inference_mode():
        assert torch.equal(exact, task.net(image / 127.5 - 1)[0])
    task.engine = EngineConfig(decode="bf16")
    near, same = task.reconstruct(image)
    assert torch.equal(codes, same)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max().clamp(min=1)
