"""task.compile: one graph for all blocks under every strategy, and nothing of evaluation or sampling in it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager, boxed_nop
from torch._dynamo.utils import counters

from forked_ranks import run_ranks
from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.tasks.strategy import ShardedStrategy
from smalto.types import SamplingConfig
from tiny_tasks import SHAPE, VOCABULARY, make_codes, make_gpt_task, make_trainer

LAYERS = 4
CLASSES = partial(ClassConditioner, num_classes=3, drop_prob=0.0)
TEXT = partial(TextConditioner, text_dim=6, num_tokens=5, drop_prob=0.1)
SHARDED = {"strategy": ShardedStrategy, "devices": 2, "inference_mode": False}
DDP = {"strategy": lambda: "ddp", "devices": 2}


def factory(*, dropout: float = 0.0, **overrides):
    rates = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout"), dropout)
    settings = {"dim": 32, "num_layers": LAYERS, "num_heads": 2, "ffn_multiple_of": 16, "conditioner": CLASSES}
    return partial(GPT, vocab_size=VOCABULARY, code_shape=SHAPE, **settings | rates | overrides)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """Graphs as the compiler is given them, run by torch's own operators: seconds instead of minutes."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", partial(compile_, backend=aot_eager))
    forget()
    with torch._dynamo.config.patch(optimize_ddp=True):  # torch's default, put back afterwards
        yield
    torch.compiler.reset()


def forget() -> None:
    torch.compiler.reset()
    counters.clear()


def graphs() -> tuple[int, dict]:
    return counters["stats"]["unique_graphs"], dict(counters["graph_break"])


def losses_of(folder, where, *, precision="32-true", **options) -> tuple[list[float], tuple[int, dict]]:
    """Three steps and a validation; what they found, and how many graphs were made for it."""
    forget()
    torch.manual_seed(0)
    task, losses = make_gpt_task(net=factory(), **options), []
    training_loss = task.training_loss
    task.training_loss = lambda batch: (loss := training_loss(batch), losses.append(float(loss.detach())))[0]
    where = where | ({"strategy": where["strategy"]()} if where else {})
    trainer = make_trainer(folder, max_steps=3, limit_val_batches=1, precision=precision, **where)
    trainer.fit(task, make_codes())
    return losses, graphs()


@pytest.mark.parametrize("recompute_every", [0, 1, 2])
def test_all_blocks_are_one_graph(tmp_path, recompute_every):
    losses, made = losses_of(tmp_path, {}, compile=True, recompute_every=recompute_every)
    assert made == (1, {})
    assert losses == losses_of(tmp_path, {})[0]


@pytest.mark.parametrize("where", [SHARDED, DDP], ids=["fsdp", "ddp"])
def test_on_two_processes_too(tmp_path, where):
    def run(rank: int) -> list:
        options = ({"compile": True}, {"compile": True, "recompute_every": 1}, {})
        return [losses_of(tmp_path, where, **option) for option in options]

    results = run_ranks(run, 2)
    assert isinstance(results[0], list), results[0]
    for compiled, recomputed, eager in results:
        assert compiled == (eager[0], (1, {}))
        assert recomputed == (eager[0], (1, {}))
        assert eager[1] == (0, {})


def test_gathered_in_half_precision(tmp_path):
    def run(rank: int) -> list:
        return [losses_of(tmp_path, SHARDED, precision="bf16-mixed", compile=c, loss_rows=16) for c in (True, False)]

    results = run_ranks(run, 2)
    assert isinstance(results[0], list), results[0]
    for compiled, eager in results:
        assert compiled[0] == pytest.approx(eager[0], abs=2e-3)
        assert compiled[1] == (1, {})


@pytest.mark.parametrize("text", [False, True])
def test_dropout_depth_and_masks_do_not_compile_per_layer(text):
    net = factory(dropout=0.1, drop_path=0.3, conditioner=TEXT if text else CLASSES)().train()
    net.compile_blocks()
    condition = (torch.ones(2, 5, 6), torch.arange(5) > torch.tensor([[2], [1]])) if text else (torch.tensor([0, 1]),)
    codes = torch.zeros(2, net.num_codes, dtype=torch.int64)
    seeded = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        nn.init.ones_(net.output.weight)
        seeded.append(net(codes, *condition))
        seeded[-1].sum().backward()
    assert graphs() == (2, {})  # the first block drops nothing, all others have their probability as an input
    assert torch.equal(seeded[0], seeded[2])
    assert not torch.equal(seeded[0], seeded[1])


def test_evaluation_and_sampling_stay_eager():
    task = make_gpt_task(net=factory(), compile=True)
    task.configure_model()
    plain = factory()()
    assert task.net.state_dict().keys() == plain.state_dict().keys()
    codes, labels = torch.zeros(2, task.net.num_codes, dtype=torch.int64), torch.tensor([0, 1])
    task.eval().net(codes, labels)
    task.sample_codes(labels, sampling=SamplingConfig(), seeds=torch.arange(2))
    task.net.prefill(labels, task.net.new_cache(2))
    assert graphs() == (0, {})


def test_what_is_no_single_graph_is_an_error():
    class Breaking(nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x

    net = factory()().train()
    net.compile_blocks()
    net.blocks[0].ffn = Breaking()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net(torch.zeros(2, net.num_codes, dtype=torch.int64), torch.tensor([0, 1]))


@pytest.mark.parametrize("recompute_every", [0, 1])
def test_gradients_of_a_block_are_there_before_earlier_blocks_are_passed(recompute_every, monkeypatch):
    """So that their exchange runs beside the rest of the backward pass."""
    events: list[int | str] = []

    def backward(graph, inputs):
        run = boxed_nop(graph, inputs)

        def noted(arguments):
            events.append("backward")
            return run(arguments)

        noted._boxed_call = True
        return noted

    backend = aot_autograd(fw_compiler=boxed_nop, bw_compiler=backward)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    net = factory()().train()
    nn.init.normal_(net.output.weight)
    net.compile_blocks()
    net.recompute_every = recompute_every
    for i, block in enumerate(net.blocks):
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, i=i: events.append(i))
    net(torch.zeros(2, net.num_codes, dtype=torch.int64), torch.tensor([0, 1])).square().sum().backward()
    sizes = [len(list(block.parameters())) for block in net.blocks]
    assert events == [event for i in reversed(range(LAYERS)) for event in ("backward", *[i] * sizes[i])]
