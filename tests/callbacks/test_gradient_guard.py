from functools import partial

import lightning as L
import pytest
import torch

from smalto.callbacks import gradient_guard
from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.gradient_guard import GradientGuard
from tiny_tasks import make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer


def make(kind: str, *, fused: bool):
    optimizer = partial(torch.optim.AdamW, lr=1e-2, betas=[0.9, 0.95], fused=fused)
    if kind == "gpt":
        return make_gpt_task(optimizer=optimizer), make_codes()
    return make_tokenizer_task(optimizer=optimizer, disc_start=1), make_images()


def spoil(task, factors: dict[int, float]) -> None:
    """Multiply the losses of these steps, counted from 0."""

    def spoilt(loss):
        return loss * factors.get(task.global_step, 1.0)

    if task.automatic_optimization:
        plain = task._loss
        task._loss = lambda batch: (spoilt(plain(batch)[0]), plain(batch)[1])
    else:
        # Both stages of the discriminator's step see the number of steps that the generator has made by then.
        generator, discriminator = task.reconstruction_loss, task.disc_loss
        task.reconstruction_loss = lambda *pair: spoilt(generator(*pair)) if task.training else generator(*pair)
        task.disc_loss = lambda real, fake: discriminator(real, fake) * factors.get(task.global_step - 1, 1.0)


class Record(L.Callback):
    """Weights and optimizer states after every step."""

    def __init__(self):
        self.states, self.metrics = [], []

    def on_train_batch_end(self, trainer, task, *args):
        state = [p.detach().clone() for p in task.parameters()]
        for optimizer in trainer.optimizers:
            state += [v.clone() for entry in optimizer.state.values() for v in entry.values()]
        self.states.append(state)
        self.metrics.append({k: float(v) for k, v in task.step_log.read().items()})


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fit(folder, kind, factors, *callbacks, fused=False, guard=None, steps=6):
    task, data = make(kind, fused=fused)
    spoil(task, factors)
    record = Record()
    torch.manual_seed(0)
    make_trainer(folder, *([guard] if guard else []), record, *callbacks, max_steps=steps, log_every_n_steps=1).fit(
        task, data
    )
    return record


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_changes_nothing(tmp_path, kind, fused, bad):
    found = fit(tmp_path, kind, {3: bad}, guard=GradientGuard(), fused=fused)
    assert same(found.states[3], found.states[2])
    assert not same(found.states[4], found.states[3])
    assert all(bool(value.isfinite().all()) for value in found.states[-1])
    skipped = [step["train/skipped_steps"] for step in found.metrics]
    assert skipped[:3] == [0, 0, 0]
    assert skipped[-1] == (1 if kind == "gpt" else 2)  # generator and discriminator
    assert 0 < found.metrics[2]["train/grad_norm"] < 1e6
    assert ("train/disc_grad_norm" in found.metrics[2]) == (kind == "tokenizer")


def test_without_it_the_weights_are_lost(tmp_path):
    found = fit(tmp_path, "gpt", {3: float("nan")})
    assert not all(bool(value.isfinite().all()) for value in found.states[-1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_good_steps_are_the_same_bit_for_bit(tmp_path, kind, fused):
    plain = fit(tmp_path, kind, {}, fused=fused)
    assert same(fit(tmp_path, kind, {}, fused=fused, guard=GradientGuard()).states[-1], plain.states[-1])


def test_a_norm_far_beyond_the_average(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_guard, "SETTLED", 3)
    factors = {1: 1e4, 4: 1e4}  # the first comes before there is an average to trust
    found = fit(tmp_path, "gpt", factors, guard=GradientGuard(spike_factor=100.0))
    assert not same(found.states[1], found.states[0])
    assert found.metrics[-1]["train/skipped_steps"] == 0  # 1e4 is part of the average now
    found = fit(tmp_path, "gpt", {4: 1e4, 5: 30.0}, guard=GradientGuard(spike_factor=1e3))
    assert same(found.states[4], found.states[3])
    assert not same(found.states[5], found.states[4])
    found = fit(tmp_path, "gpt", {4: 1e4}, guard=GradientGuard(spike_factor=None))
    assert not same(found.states[4], found.states[3])


@pytest.mark.parametrize("fused", [False, True])
def test_a_tokenizers_norm_is_that_before_the_clip(tmp_path, monkeypatch, fused):
    monkeypatch.setattr(gradient_guard, "SETTLED", 3)
    found = fit(tmp_path, "tokenizer", {4: 1e6}, guard=GradientGuard(), fused=fused)
    norms = [step["train/grad_norm"] for step in found.metrics]
    clip = make("tokenizer", fused=fused)[0].gradient_clip
    assert clip == 1.0
    assert max(norms) > 1e3, "the clip would have brought it to 1"
    assert all(norm != pytest.approx(clip, rel=1e-3) for norm in norms)
    assert found.metrics[-1]["train/skipped_steps"] == 2  # of both networks
    assert same(found.states[4], found.states[3])
    assert not same(found.states[5], found.states[4])


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_the_norm_is_computed_once(tmp_path, monkeypatch, kind):
    asked = []
    plain = torch.nn.utils.get_total_norm

    def counted(*arguments, **settings):
        asked.append(1)
        return plain(*arguments, **settings)

    monkeypatch.setattr(torch.nn.utils, "get_total_norm", counted)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", None)
    task, data = make(kind, fused=True)
    clip = {"gradient_clip_val": 1.0} if kind == "gpt" else {}
    make_trainer(tmp_path, GradientGuard(), max_steps=4, **clip).fit(task, data)
    assert len(asked) == (4 if kind == "gpt" else 4 + 3)


def test_nothing_but_bad_steps_ends_the_run_with_the_last_good_checkpoint(tmp_path):
    guard = GradientGuard(patience=3)
    saver = LatestCheckpoint(dirpath=tmp_path / "checkpoints", every_n_steps=2)
    with pytest.raises(
        ValueError,
        match=r"last 5 steps, up to step 9, .*step_00000008.ckpt holds good weights: start anew with init_from=",
    ):
        fit(tmp_path, "gpt", dict.fromkeys(range(4, 20), float("nan")), saver, guard=guard, steps=20)
    state = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())


def test_averages_and_counts_survive_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_guard, "SETTLED", 3)
    factors = {2: float("nan"), 5: 5.0}
    states, settings = [], {"spike_factor": 3.0, "patience": 4}
    for stops in ((8,), (4, 8)):
        checkpoint = None
        for stop in stops:
            task, data = make("gpt", fused=True)
            spoil(task, factors)
            guard = GradientGuard(**settings)
            torch.manual_seed(0)
            trainer = make_trainer(tmp_path, guard, max_steps=stop)
            trainer.fit(task, data, ckpt_path=checkpoint, weights_only=True)
            checkpoint = tmp_path / f"{stop}.ckpt"
            trainer.save_checkpoint(checkpoint)
        states.append(guard.state_dict())
    assert states[0]["watches"][0]["skipped"] == states[1]["watches"][0]["skipped"] == 2
    assert states[0]["watches"][0]["good"] == states[1]["watches"][0]["good"] == 6


@pytest.mark.parametrize("settings", [{"patience": 0}, {"spike_factor": 1.0}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(ValueError, match=r"patience is .* \(needs >= 1\), spike_factor is .* \(needs > 1"):
        GradientGuard(**settings)
