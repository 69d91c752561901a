"""The tokenizer under bf16-mixed, compiled, and laid out in memory: what must not change with them."""

from functools import partial

import lightning as L
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from smalto.losses.perceptual import PerceptualLoss
from smalto.nn import layout
from smalto.runtime import compose
from smalto.tokenizers.quantize import VectorQuantizer
from tiny_tasks import TOKENIZER, make_images, make_tokenizer_task, make_trainer

ENTROPY = partial(
    TOKENIZER,
    image_size=32,
    quantizer=partial(VectorQuantizer, codebook_size=16, codebook_dim=4, entropy_weight=0.1),
)
SQUEEZE = partial(PerceptualLoss, net="squeeze_caffe")


class Distance(torch.nn.Module):
    """A perceptual loss without a network."""

    name = "lpips_stub"

    def forward(self, x, y):
        return (x - y).abs().mean(dim=(1, 2, 3))


@pytest.fixture
def image(generator) -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1


def built(**options):
    task = make_tokenizer_task(**{"net": ENTROPY, "perceptual": SQUEEZE} | options)
    task.configure_model()
    return task


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_every_term_of_the_loss_is_float32_under_bfloat16(image, loss):
    task = built(reconstruction_loss=loss, adaptive_disc_weight=True)
    terms = {}
    plain = task.gen_loss
    task.gen_loss = lambda fake: terms.setdefault("logits", fake.dtype) and plain(fake)
    with torch.autocast("cpu", torch.bfloat16):
        reconstruction, losses = task.generator_losses(image, adversarial=True)
        disc = task.disc_loss(task.discriminator(image), task.discriminator(reconstruction.detach()))
    assert (reconstruction.dtype, terms["logits"]) == (torch.bfloat16, torch.bfloat16), "nothing was in half precision"
    assert len(losses) == 8
    assert {name: value.dtype for name, value in losses.items()} == dict.fromkeys(losses, torch.float32)
    assert disc.dtype == torch.float32


class Logits(L.Callback):
    """What the discriminator says, by dtype, and what is logged of it."""

    def on_train_start(self, trainer, task):
        self.seen = []
        task.discriminator.register_forward_hook(lambda module, inputs, output: self.seen.append(output.detach()))

    def on_train_batch_end(self, trainer, task, *rest):
        values = task.step_log.read()
        self.logged = [values[f"train/disc_{name}"] for name in ("real", "fake")]


def test_what_is_logged_of_the_discriminator_is_a_mean_in_float32(tmp_path):
    logits = Logits()
    task = make_tokenizer_task(disc_start=0)
    make_trainer(tmp_path, logits, precision="bf16-mixed", max_steps=1).fit(task, make_images())
    assert logits.seen[-1].dtype == torch.bfloat16
    assert logits.logged == [x.float().mean() for x in logits.seen[-2:]]


def test_validation_is_in_float32_as_evaluation_is(tmp_path):
    found = []
    for precision in ("32-true", "bf16-mixed"):
        task = make_tokenizer_task(net=ENTROPY)
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, precision=precision)
        data = make_images()
        data.image_size = 32
        (metrics,) = trainer.validate(task, data, verbose=False)
        found.append(metrics)
    assert found[0]["val/rec_loss"] > 0
    assert found[0] == found[1]


def counting(graphs: list) -> partial:
    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    return partial(torch.compile, backend=backend)


def test_compiled_training_keeps_names_and_numbers(image, monkeypatch):
    torch._dynamo.reset()
    graphs: list = []
    monkeypatch.setattr(torch, "compile", counting(graphs))
    eager, compiled = built(perceptual=Distance), built(perceptual=Distance, compile=True)
    compiled.load_state_dict(eager.state_dict())
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for again in (False, True):
        values = []
        with torch._dynamo.config.patch(error_on_recompile=again):
            for task in (eager, compiled):
                reconstruction, losses = task.generator_losses(image, adversarial=True)
                losses["loss"].backward()
                values.append((reconstruction.detach(), *(p.grad for p in task.net.parameters())))
        for ours, wanted in zip(*values, strict=True):
            torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    assert len(graphs) == 3  # encoder, decoder, perceptual loss: each whole
    convolutions = [sum("conv2d" in str(node.target) for node in graph.graph.nodes) for graph in graphs]
    assert convolutions[:2] == [
        sum(isinstance(module, torch.nn.Conv2d) for module in part.modules())
        for part in (compiled.net.encoder, compiled.net.decoder)
    ]


def test_other_sizes_of_evaluation_compile_nothing(image, monkeypatch):
    torch._dynamo.reset()
    graphs: list = []
    monkeypatch.setattr(torch, "compile", counting(graphs))
    task = built(compile=True)
    task.eval()
    for size in (1, 2, 3):
        with torch.no_grad():
            task.net(image[:size])
        task.reconstruct(torch.zeros(size, 3, 32, 32, dtype=torch.uint8))
    assert task.training_flops == built().training_flops
    assert not graphs


@pytest.mark.slow
def test_the_perceptual_network_is_one_graph(image, monkeypatch):
    torch._dynamo.reset()
    graphs: list = []
    monkeypatch.setattr(torch, "compile", counting(graphs))
    eager, compiled = built(), built(compile=True)
    pair = (image.clone().requires_grad_(), image.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        values = [task._distance(task.perceptual, *pair) for task in (eager, compiled)]
    assert len(graphs) == 1
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=0)


@pytest.mark.slow
def test_the_real_compiler_trains_alike(tmp_path):
    torch._dynamo.reset()
    losses = []
    for compile in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, max_steps=3)
        data = make_images()
        data.image_size = 32
        trainer.fit(make_tokenizer_task(net=ENTROPY, perceptual=Distance, compile=compile), data)
        losses.append({key: float(value) for key, value in trainer.callback_metrics.items()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-3, abs=1e-4)


def test_the_layout_follows_the_device(image, monkeypatch):
    task = built()
    weight, judge = task.net.decoder.conv_in.weight, task.discriminator.main[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert layout.image_layout(torch.device("cuda", 0)) is torch.contiguous_format
    assert layout.image_layout(torch.device("cpu")) is torch.channels_last
    monkeypatch.setitem(layout.LAYOUTS, "meta", torch.contiguous_format)  # as that of CUDA
    task.to("meta")
    weight, judge = task.net.decoder.conv_in.weight, task.discriminator.main[0].weight
    assert weight.is_contiguous()
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    assert judge.is_contiguous(memory_format=torch.channels_last)  # no group normalisation there
    batch = {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")}
    assert task._image(batch).is_contiguous()


def test_only_another_device_changes_the_layout():
    net = ENTROPY()
    assert net.decoder.conv_in.weight.is_contiguous()
    assert net.float().to("cpu").decoder.conv_in.weight.is_contiguous()
    chosen = net.to(memory_format=torch.channels_last).decoder.conv_in.weight
    assert chosen.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_are_tuned_but_not_in_deterministic_runs(tmp_path, monkeypatch):
    assert compose("train", ["task=tokenizer"]).trainer.benchmark is True
    assert compose("train", ["task=gpt"]).trainer.benchmark is False
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        for deterministic in (False, True):
            trainer = make_trainer(tmp_path, benchmark=True, deterministic=deterministic, max_steps=1)
            trainer.fit(make_tokenizer_task(), make_images())
            assert torch.backends.cudnn.benchmark is not deterministic
    finally:
        torch.use_deterministic_algorithms(False)
