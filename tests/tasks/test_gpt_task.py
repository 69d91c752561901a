"""Behaviour over time of generator training, and its pictures."""

from contextlib import nullcontext

import lightning as L
import pytest
import torch

from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.ema import EMA, averaged_weights
from smalto.callbacks.step_seed import StepSeed
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.engine import DecodeEngine, EngineConfig
from smalto.sampling.memory import bytes_per_image
from smalto.tasks.optim import Schedule
from smalto.types import SamplingConfig
from tiny_tasks import VOCABULARY, make_codes, make_gpt_task, make_trainer


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.values.append(float(outputs["loss"]).hex())


def test_learns_below_the_entropy_of_single_codes(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=150, gradient_clip_val=1.0)
    trainer.fit(make_gpt_task(schedule=Schedule()), make_codes())
    assert trainer.callback_metrics["val/loss"] < 0.8 * torch.tensor(float(VOCABULARY)).log()


def test_validation_needs_no_training_mode_and_draws_nothing(tmp_path):
    task = make_gpt_task()
    trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    task.configure_model()
    state = torch.get_rng_state()
    first = trainer.validate(task, make_codes(), verbose=False)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(before, state)
    assert first == trainer.validate(task, make_codes(), verbose=False)


def test_validation_computes_in_float32_whatever_training_does(tmp_path):
    task = make_gpt_task()
    task.configure_model()
    torch.nn.init.normal_(task.net.output.weight)

    def validated(precision: str) -> list:
        return make_trainer(tmp_path, precision=precision).validate(task, make_codes(), verbose=False)

    assert validated("bf16-mixed") == validated("32-true")


def test_training_after_sampling_and_sampling_twice(tmp_path):
    task = make_gpt_task()
    make_trainer(tmp_path, max_steps=3).fit(task, make_codes())
    sampling, seeds = SamplingConfig(cfg_scale=2.0), torch.tensor([1, 2])
    one = task.sample_codes(torch.tensor([0, 1]), sampling=sampling, seeds=seeds)
    two = task.sample_codes(torch.tensor([0, 1]), sampling=sampling, seeds=seeds)
    assert torch.equal(one, two)
    make_trainer(tmp_path, max_steps=3).fit(task, make_codes())


def drawn(task, *, scale: float = 2.0, images: int = 2) -> torch.Tensor:
    labels = torch.arange(images) % 3
    return task.sample_codes(labels, sampling=SamplingConfig(cfg_scale=scale), seeds=labels)


def test_samples_follow_the_weights():
    task = make_gpt_task()
    task.configure_model()
    before = drawn(task)
    with torch.no_grad():
        task.net.output.weight.normal_()
    assert not torch.equal(before, drawn(task))


def test_fixed_weights_are_packed_once(monkeypatch):
    task = make_gpt_task()
    task.configure_model()
    torch.nn.init.normal_(task.net.output.weight)
    built = []
    monkeypatch.setattr(
        "smalto.tasks.gpt.DecodeEngine",
        lambda *args, **settings: built.append(settings) or DecodeEngine(*args, **settings),
    )
    apart = [drawn(task), drawn(task, scale=1.0), drawn(task, images=3)]
    assert len(built) == 3
    with task.fixed_weights():
        together = [drawn(task), drawn(task, scale=1.0), drawn(task, images=3)]
    assert len(built) == 4
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))
    torch.nn.init.normal_(task.net.output.weight)
    assert not torch.equal(drawn(task), apart[0])


def test_the_dtype_of_sampling_is_the_one_asked_for(monkeypatch):
    task = make_gpt_task()
    task.configure_model()
    built = []
    monkeypatch.setattr(
        "smalto.tasks.gpt.DecodeEngine",
        lambda *args, **settings: built.append(settings) or DecodeEngine(*args, **settings),
    )
    for dtype in ("fp32", "bf16"):
        task.engine = EngineConfig(dtype=dtype)
        drawn(task)
    assert [settings["dtype"] for settings in built] == ["fp32", "bf16"]


def test_pictures_are_decoded_as_the_engine_says(make_vq):
    task = make_gpt_task()
    task.configure_model()
    task.attach_tokenizer(make_vq(), {})
    task.to_pixels = lambda picture: picture
    seen = []
    task.tokenizer.decoder.conv_out.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    codes = torch.arange(32).view(2, 16)
    exact = task.decode_codes(codes)
    assert torch.equal(exact, task.tokenizer.decode(codes))
    task.engine = EngineConfig(decode="bf16")
    near = task.decode_codes(codes)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
    assert near.dtype == torch.float32
    assert 0 < (near - exact).abs().max() < 0.1 * exact.abs().max().clamp(min=1)
    with pytest.raises(ValueError, match=r"engine\.decode is 'fp16', must be one of fp32, bf16, auto"):
        EngineConfig(decode="fp16")


def test_a_batch_beyond_memory_is_refused_before_any_work(monkeypatch):
    task = make_gpt_task()
    task.configure_model()
    monkeypatch.setattr("smalto.sampling.memory.free_bytes", lambda device: 10**6)
    monkeypatch.setattr("smalto.tasks.gpt.DecodeEngine", lambda *args, **settings: pytest.fail("work was done"))
    with pytest.raises(ValueError, match="the largest batch that fits is"):
        drawn(task, images=1000)


def test_memory_that_a_batch_takes_over_is_counted_as_free(monkeypatch):
    """A compiled engine keeps its cache from batch to batch."""
    task = make_gpt_task()
    task.configure_model()
    task.engine = EngineConfig(dtype="fp32", compile=True)
    monkeypatch.setattr("smalto.sampling.compiled.torch.compile", lambda function, **settings: function)
    free = 10**6 // 4
    monkeypatch.setattr("smalto.sampling.memory.free_bytes", lambda device: free)
    with task.fixed_weights():
        with pytest.raises(ValueError, match="the largest batch that fits is"):
            drawn(task, images=1000)
        free = 10**9
        drawn(task, images=2)
        assert isinstance(task._packed, CompiledEngine)
        each = bytes_per_image(task.net, guided=True, itemsize=4)
        free = 2 * each - task._packed.held_bytes
        drawn(task, images=2)
        with pytest.raises(ValueError, match="the largest batch that fits is 2 "):
            drawn(task, images=3)


def test_labels_that_the_model_does_not_know_are_refused():
    task = make_gpt_task()
    task.configure_model()
    with pytest.raises(ValueError, match="0 to 2"):
        task.sample_codes(torch.tensor([3]), sampling=SamplingConfig(), seeds=torch.tensor([0]))


def test_pictures_without_a_tokenizer_say_what_is_missing():
    task = make_gpt_task()
    task.configure_model()
    with pytest.raises(ValueError, match="tokenizer_ckpt"):
        task.sample_images(torch.tensor([1]), sampling=SamplingConfig(), seeds=torch.tensor([0]))


def test_a_tokenizer_of_another_grid_is_refused(make_vq):
    task = make_gpt_task()
    task.configure_model()
    with pytest.raises(ValueError, match=r"grid \(\(8, 8\),\).*expects 32 on \(\(4, 4\),\)"):
        task.attach_tokenizer(make_vq(image_size=32), {})


def test_tokenizer_rides_along_frozen(tmp_path, make_vq):
    task = make_gpt_task()
    task.configure_model()
    tokenizer = make_vq()
    before = {key: value.clone() for key, value in tokenizer.state_dict().items()}
    task.attach_tokenizer(tokenizer, {"_target_": "x"})
    make_trainer(tmp_path, max_steps=2).fit(task, make_codes())
    assert all(torch.equal(before[key], value) for key, value in task.tokenizer.state_dict().items())
    assert not task.train().tokenizer.training
    images = task.sample_images(torch.tensor([0, 2]), sampling=SamplingConfig(), seeds=torch.tensor([0, 1]))
    assert images.dtype == torch.uint8
    assert images.shape == (2, 3, 16, 16)


def run(folder, steps: int, *, stop_at: int | None = None) -> tuple[list[str], dict]:
    class Die(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.global_step == stop_at:
                raise RuntimeError("killed")

    torch.manual_seed(1)
    losses, average = Losses(), EMA(decay=0.9)
    saver = LatestCheckpoint(dirpath=folder, every_n_steps=2)
    trainer = make_trainer(
        folder, StepSeed(seed=0), average, losses, Die(), saver, max_steps=steps, gradient_clip_val=1.0
    )
    task = make_gpt_task()
    found = sorted(folder.glob("step_*.ckpt"))
    dies = pytest.raises(RuntimeError, match="killed") if stop_at is not None else nullcontext()
    with dies:
        trainer.fit(task, make_codes(), ckpt_path=found[-1] if found else None, weights_only=True)
    return losses.values, {**task.state_dict(), **{f"ema.{k}": v for k, v in average.shadow.items()}}


# 8 batches an epoch: before, at and after the end of one
@pytest.mark.parametrize("stop_at", [3, 8, 9])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, stop_at):
    whole, final = run(tmp_path / "whole", 12)
    before, _ = run(tmp_path / "broken", 12, stop_at=stop_at)
    after, resumed = run(tmp_path / "broken", 12)
    assert before == whole[:stop_at]
    assert after == whole[stop_at - stop_at % 2 :]
    assert all(torch.equal(final[key], resumed[key]) for key in final)


def test_averaged_weights_reach_samples_and_leave_again(tmp_path):
    average = EMA(decay=0.5)
    trainer = make_trainer(tmp_path, average, max_steps=3)
    task = make_gpt_task()
    trainer.fit(task, make_codes())
    live = task.net.output.weight.clone()
    with averaged_weights(trainer, task.net):
        assert torch.equal(task.net.output.weight, average.shadow["output.weight"])
        assert not torch.equal(task.net.output.weight, live)
    assert torch.equal(task.net.output.weight, live)


def test_codes_of_other_tokenizer_weights_are_refused_before_training(tmp_path, make_vq):
    task = make_gpt_task()
    task.configure_model()
    task.attach_tokenizer(make_vq(), {})
    task._tokenizer_fingerprint = "0123456789abcdef"
    data = make_codes()
    data.meta = {"tokenizer": {"path": "other.ckpt", "fingerprint": "fedcba9876543210"}}
    with pytest.raises(ValueError, match=r"written by other\.ckpt.*smalto extract"):
        make_trainer(tmp_path, max_steps=1).fit(task, data)
