"""Planned memory against what PyTorch's allocator handed out in a real training."""

import json
from contextlib import nullcontext

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from smalto.nn.live_memory import LiveBytes
from smalto.plan import make_plan
from smalto.planning import step
from smalto.planning.gpu_rules import gpu_rules
from smalto.planning.outline import build_outline, fake_weights
from smalto.planning.step import StepBytes, trace_step
from smalto.runtime import build, compose
from tiny_tasks import make_gpt_task, make_tokenizer_task

THIS_CPU = [
    "device=measured",
    "devices.measured.fp32_tflops=1",
    "devices.measured.half_tflops=1",
    "devices.measured.bandwidth_gb_s=1",
]
COMMON = [
    "data.num_train=32",
    "data.batch_size=16",
    "trainer.max_steps=2",
    "trainer.accelerator=cpu",
    "callbacks=_common",
]
GPT = ["task=gpt", "model=nano", "model.num_layers=3", "tokenizer.quantizer.codebook_size=1024", "image_size=128"]
RUNS = {
    "gpt": [*GPT, "data=synthetic_codes"],
    "text, recomputing, logits by rows": [
        *(*GPT, "data=synthetic_text", "conditioner=text", "model.conditioner.text_dim=64"),
        *("model.conditioner.num_tokens=20", "task.recompute_every=2", "task.loss_rows=64"),
    ],
    "tokenizer": [
        *("task=tokenizer", "data=synthetic_images", "tokenizer=demo", "image_size=32", "task.disc_start=0"),
        *("tokenizer.base_channels=32", "tokenizer.channel_multipliers=[1,2]", "perceptual=none"),
        *("discriminator.num_layers=1", "data.batch_size=4", "data.num_train=8"),
    ],
}


def allocated_at_most(config, folder) -> int:
    """Peak of bytes from PyTorch's allocator while the task is built and trained."""
    task, data, ema = build(config.task), build(config.data), build(config.callbacks.ema)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer: L.Trainer = build(config.trainer, callbacks=[ema], default_root_dir=str(folder), **options)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        trainer.fit(task, data)
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = [e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=name, marks=pytest.mark.slow if "text" in name else ()) for name, run in RUNS.items()]
)
def test_a_training_takes_what_was_planned(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTO_LAUNCHED_AT", "test")
    planned = make_plan(compose("plan", [*COMMON, *run, *THIS_CPU]))["memory"]["strategies"]["auto"]
    measured = allocated_at_most(compose("train", [*COMMON, *run, "run_dir=x"]), tmp_path)
    # 4 seen for the tokenizer: scratch space of convolutions.
    assert planned["total"] == pytest.approx(measured, rel=0.05)
    assert planned["activations"] > 0.2 * planned["total"], "the weights alone would not be a test"


def outlined(task):
    build_outline(task)
    return task


def test_blocks_that_are_not_traced_are_known_to_the_byte():
    task = outlined(
        make_gpt_task(net=lambda: make_gpt_task().net_factory(num_layers=7, drop_path=0.1), recompute_every=2)
    )
    settings = {"images": 4, "precision": "bf16-mixed", "gpu": True, "cast_weights": False}
    assert trace_step(task, **settings) == step._trace(task, **settings)
    assert len(task.net.blocks) == 7


def kept_by_forward(task, device, rules) -> int:
    """Bytes that a forward pass under autocast leaves behind."""
    mode = FakeTensorMode()
    fake_weights(task, mode)
    with mode:
        for module in task.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    tensors[name] = torch.nn.Parameter(moved) if name in module._parameters else moved
        task.train()
        torch.set_autocast_enabled(device, True)  # torch.autocast itself wants to see a GPU
        torch.set_autocast_dtype(device, torch.bfloat16)
        try:
            with rules, LiveBytes() as live:
                if hasattr(task, "training_loss"):
                    codes = torch.zeros(4, task.net.num_codes, dtype=torch.int64, device=device)
                    kept = task.training_loss({"codes": codes, "label": codes[:, 0]})
                else:
                    image = torch.zeros(4, 3, 16, 16, device=device)
                    kept = task.generator_losses(image, adversarial=True)
                torch.clear_autocast_cache()
                assert kept is not None
                return live.live
        finally:
            torch.set_autocast_enabled(device, False)


def one_kernel(query, key, value, **options):
    """The same attention everywhere: which one a GPU takes cannot be asked without one."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)[0]


@pytest.mark.parametrize("make", [make_gpt_task, make_tokenizer_task])
def test_gpu_rules_keep_what_a_fake_gpu_keeps(make, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", one_kernel)
    on_gpu = kept_by_forward(outlined(make()), "cuda", nullcontext())
    assert kept_by_forward(outlined(make()), "cpu", gpu_rules()) == pytest.approx(on_gpu, rel=0.02)
    assert kept_by_forward(outlined(make()), "cpu", nullcontext()) != pytest.approx(on_gpu, rel=0.02)


def test_steps_between_and_beyond_traced_batches():
    assert StepBytes(10, 20, 30).toward(StepBytes(20, 10, 50), 1.5) == StepBytes(25, 5, 60)
    assert StepBytes(10, 20, 30).without_gradients == 20
    assert StepBytes(10, 20, 30).with_gradients(15) == 30
    assert StepBytes(10, 20, 30).with_gradients(25) == 35
