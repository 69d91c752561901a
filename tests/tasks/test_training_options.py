"""Options of the training step: what they may change is time and memory, not the numbers."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smalto.callbacks.throughput import Throughput
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from tiny_tasks import SHAPE, VOCABULARY, make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer

LEARNING_RATE = 1e-2


def weights_after(folder, *, trainer=None, batch_size=8, dropout=0.1, steps=3, **options):
    net = partial(
        GPT,
        dim=32,
        num_layers=3,
        num_heads=2,
        vocab_size=VOCABULARY,
        code_shape=SHAPE,
        conditioner=partial(ClassConditioner, num_classes=3, drop_prob=dropout),
        ffn_multiple_of=16,
        token_dropout=dropout,
        resid_dropout=dropout,
        ffn_dropout=dropout,
    )
    task, data = make_gpt_task(net=net, **options), make_codes()
    data.batch_size = batch_size
    torch.manual_seed(0)
    task.configure_model()
    torch.nn.init.normal_(task.net.output.weight, std=0.02)  # at zero no gradient would reach the blocks
    make_trainer(folder, max_steps=steps, gradient_clip_val=1.0, **trainer or {}).fit(task, data)
    return task.net.state_dict()


def assert_same(found, wanted, *, share=1e-3):
    """To a share of a step: AdamW divides by the gradient's size, which magnifies rounding of tiny ones."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=share * LEARNING_RATE, msg=name)


FUSED = partial(torch.optim.AdamW, lr=LEARNING_RATE, betas=[0.9, 0.95], fused=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [make_gpt_task, make_tokenizer_task])
def test_fused_optimizers_are_clipped_in_every_precision(tmp_path, monkeypatch, make, precision):
    """Lightning's own clipping refuses fused optimizers in bf16-mixed."""
    norms = []
    step = torch.optim.AdamW.step

    def watched(optimizer, closure=None):
        if closure is not None:
            closure()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    task, data = make(optimizer=FUSED), make_codes() if make is make_gpt_task else make_images()
    clip = {"gradient_clip_val": 0.01} if make is make_gpt_task else {}
    if make is make_tokenizer_task:
        task.gradient_clip = 0.01
    make_trainer(tmp_path, max_steps=5, precision=precision, **clip).fit(task, data)
    assert len(norms) == (5 if make is make_gpt_task else 7)  # the discriminator starts at step 3
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_blocks_give_the_same_weights_with_dropout(tmp_path, every):
    assert_same(weights_after(tmp_path, recompute_every=every), weights_after(tmp_path))


def test_recomputed_blocks_run_twice_in_training_only(class_gpt):
    calls = []
    class_gpt.recompute_every = 2
    for block in class_gpt.blocks:
        block.ffn_norm.register_forward_pre_hook(lambda *_, block=block: calls.append(block))
    codes = torch.zeros(1, class_gpt.num_codes, dtype=torch.int64)
    class_gpt.train()(codes, torch.tensor([0])).sum().backward()
    assert len(calls) == len(class_gpt.blocks) + (len(class_gpt.blocks) + 1) // 2
    calls.clear()
    class_gpt.eval()(codes, torch.tensor([0])).sum().backward()
    assert len(calls) == len(class_gpt.blocks)


@pytest.mark.parametrize("rows", [5, 10_000])
def test_loss_by_rows_gives_the_same_weights(tmp_path, rows):
    assert_same(weights_after(tmp_path, loss_rows=rows), weights_after(tmp_path))


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path):
    halves = weights_after(tmp_path, batch_size=8, trainer={"accumulate_grad_batches": 2}, dropout=0.0)
    assert_same(halves, weights_after(tmp_path, batch_size=16, dropout=0.0))


def test_compile_is_asked_of_the_network(monkeypatch):
    asked = []
    monkeypatch.setattr(GPT, "compile_blocks", lambda self: asked.append(self))
    make_gpt_task().configure_model()
    assert not asked
    task = make_gpt_task(compile=True)
    task.configure_model()
    assert asked == [task.net]


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(tmp_path):
    assert_same(weights_after(tmp_path, compile=True, dropout=0.0), weights_after(tmp_path, dropout=0.0), share=1e-2)


@pytest.mark.parametrize("option", ["loss_rows", "recompute_every"])
def test_negative_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} is -1"):
        make_gpt_task(**{option: -1})


class CountWaits(TorchDispatchMode):
    """Numbers fetched from the device, each of which would make a GPU finish first."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_no_step_waits_for_the_device(tmp_path, kind):
    def waits(steps: int) -> int:
        fused = partial(torch.optim.AdamW, lr=1e-2, fused=True)
        task = make_gpt_task(optimizer=fused) if kind == "gpt" else make_tokenizer_task(optimizer=fused, disc_start=0)
        settings = {"limit_val_batches": 0, "log_every_n_steps": 1000}
        settings |= {"gradient_clip_val": 1.0} if kind == "gpt" else {}
        trainer = make_trainer(tmp_path, Throughput(window=2, peak_tflops=1.0), max_steps=steps, **settings)
        with CountWaits() as counter:
            trainer.fit(task, make_codes() if kind == "gpt" else make_images())
        return counter.count

    assert waits(7) == waits(3)
