"""The engine draws from a model that it covers wholly, and refuses every other one."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.nn.mlp import SwiGLU
from smalto.sampling import coverage, engine
from smalto.sampling.alike import gated, norm
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.coverage import TOLERANCE, check_structure
from smalto.sampling.engine import DecodeEngine
from smalto.sampling.packed import _has_fp16
from smalto.types import SamplingConfig

DTYPES = ["fp32", "bf16", "int8", *(["fp16"] if _has_fp16() else [])]


class Louder(SwiGLU):
    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(GPT):
    def step(self, codes, cache):
        return super().step(codes, cache) + 1


class OtherText(TextConditioner):
    def forward(self, text):
        return -super().forward(text)


class Low(nn.Module):
    """Half of LoRA."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.down = linear, nn.Parameter(torch.randn(2, linear.in_features))
        self.weight = linear.weight

    def forward(self, x):
        return self.linear(x)


def _bias(net):
    linear = net.blocks[1].attention.qkv
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


def _hook(net):
    net.blocks[0].ffn.register_forward_hook(lambda module, args, out: 0.5 * out)


def _pre_hook(net):
    net.norm.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _parametrization(net):
    nn.utils.parametrizations.weight_norm(net.blocks[0].attention.proj)


def _lora(net):
    net.blocks[0].attention.qkv = Low(net.blocks[0].attention.qkv)


def _type(net):
    net.blocks[1].ffn.__class__ = Louder


def _subclass(net):
    net.__class__ = Shifted


def _method(net):
    net.blocks[0].forward = lambda x, rope, **_: x


def _parameter(net):
    net.blocks[0].attention.temperature = nn.Parameter(torch.ones(4))


def _buffer(net):
    net.register_buffer("mean", torch.zeros(32))


def _module(net):
    net.blocks[1].adapter = nn.Linear(32, 32)


def _heads(net):
    net.blocks[1].attention.num_heads, net.blocks[1].attention.num_kv_heads = 2, 5
    net.blocks[1].attention.head_dim = 8


def _rope(net):
    net.rope = net.rope[:, :2]


def _norm(net):
    net.blocks[0].attention_norm = nn.LayerNorm(32)


def _embedding_hook(net):
    net.token_embedding.register_forward_hook(lambda module, args, out: -out)


CHANGES = {
    _bias: "blocks.1.attention.qkv.bias is a parameter it does not read",
    _hook: "blocks.0.ffn has a forward hook",
    _pre_hook: "norm has a forward hook",
    _embedding_hook: "token_embedding has a forward hook",
    _parametrization: "blocks.0.attention.proj is a ParametrizedLinear, not a Linear",
    _lora: "blocks.0.attention.qkv is a Low, not a Linear",
    _type: "blocks.1.ffn is a Louder, not a SwiGLU",
    _subclass: "it is a Shifted, the engine knows GPT",
    _method: "blocks.0 has a forward of its own",
    _parameter: "blocks.0.attention.temperature is a parameter it does not read",
    _buffer: "the model.mean is a buffer it does not read",
    _module: "blocks.1.adapter is a Linear, which it does not know",
    _heads: "blocks.1.attention.num_heads is 2, not 4",
    _rope: r"the model.rope has shape \(13, 2, 2\), not \(13, 4, 2\)",
    _norm: "blocks.0.attention_norm is a LayerNorm, not a RMSNorm",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__[1:])
@pytest.mark.parametrize("make", [partial(DecodeEngine, dtype="fp32", rows=2), partial(CompiledEngine, dtype="fp32")])
def test_what_it_does_not_compute_is_named(make_gpt, change, make):
    net = make_gpt()
    make(net)  # a model that was compared once is looked at again all the same
    change(net)
    with pytest.raises(ValueError, match=f"does not cover this model: .*{CHANGES[change]}.*generate takes the model"):
        make(net)


def test_the_way_out_draws(make_gpt):
    net = make_gpt()
    _bias(net)
    codes = generate(
        net, torch.tensor([1, 2]), sampling=SamplingConfig(), uniforms=uniforms_from_seeds(torch.arange(2), 12)
    )
    assert codes.shape == (2, 12)


def test_a_text_conditioner_is_packed_and_others_are_called(make_gpt):
    net = make_gpt(text=True)
    net.conditioner.fc1.register_forward_hook(lambda module, args, out: -out)
    with pytest.raises(ValueError, match=r"conditioner\.fc1 has a forward hook"):
        DecodeEngine(net, rows=2)
    net = make_gpt(text=True)
    net.conditioner.__class__ = OtherText
    with pytest.raises(ValueError, match="conditioner is a OtherText, not a TextConditioner"):
        DecodeEngine(net, rows=2)

    class Louder(ClassConditioner):
        def forward(self, label):
            return 2 * super().forward(label)

    net = make_gpt()
    net.conditioner.__class__ = Louder
    DecodeEngine(net, dtype="fp32", rows=2)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_kv_heads": 1}, {"dim": 200, "num_heads": 2}, {"num_layers": 1}, {"code_shape": ((1, 1),)}]
    + [{"norm_eps": 0.3}, {"vocab_size": 7, "ffn_multiple_of": 24}, {"resid_dropout": 0.5, "drop_path": 0.3}],
)
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_plain_model_is_covered(make_gpt, overrides, text, dtype):
    net = make_gpt(text=text, **overrides).train()
    net.blocks[0].eval()
    net.recompute_every = 1
    net.register_forward_hook(lambda module, args, out: out)  # nothing calls the whole model in decoding
    state, modes = torch.get_rng_state(), [module.training for module in net.modules()]
    DecodeEngine(net, dtype=dtype, rows=2)
    assert torch.equal(state, torch.get_rng_state()), "losses of a training that draws samples would change"
    assert modes == [module.training for module in net.modules()]


def test_compiled_in_place_is_covered(make_gpt):
    net = make_gpt()
    for block in net.blocks:
        block.compile(backend="eager")
    DecodeEngine(net, dtype="fp32", rows=2)


@pytest.fixture
def one_process():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_sharded_modules_are_looked_at_without_their_own_hooks_and_not_run(make_gpt):
    net = make_gpt()
    for module in (*net.blocks, net):
        fully_shard(module)
    check_structure(net)
    net.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(ValueError, match=r"blocks\.1 has a forward hook"):
        check_structure(net)


MISTAKES = {
    "gate and up exchanged": ("gated", lambda both: gated(torch.cat(both.chunk(2, dim=-1)[::-1], dim=-1))),
    "layers of the feed-forward part left out": ("gated", lambda both: 0 * gated(both)),
    "a third of the norm": ("norm", lambda x, floor: norm(x, floor) / 3),
    "not turned": ("turned", lambda x, factors: x.float()),
}
SEEN_IN = {"not turned": ("fp32", "fp16")}  # the angle of the first codes is small: as far as int8 may be


@pytest.mark.parametrize(
    ("mistake", "dtype"), [(m, dtype) for m in MISTAKES for dtype in DTYPES if dtype in SEEN_IN.get(m, DTYPES)]
)
def test_other_logits_than_the_models_are_refused(make_gpt, monkeypatch, mistake, dtype):
    net = make_gpt(dim=128, vocab_size=256, num_layers=4)
    name, replacement = MISTAKES[mistake]
    monkeypatch.setattr(engine, name, replacement)
    with pytest.raises(ValueError, match=f"other logits than the model in {dtype}: .* rounding explains"):
        DecodeEngine(net, dtype=dtype, rows=2)


def test_the_row_is_compared_once_per_model_if_it_showed_something(make_gpt, monkeypatch):
    net, compared = make_gpt(), []
    real = coverage._logits_of_both
    monkeypatch.setattr(coverage, "_logits_of_both", lambda *args: compared.append(1) or real(*args))
    weight = net.output.weight.detach().clone()
    nn.init.zeros_(net.output.weight)  # as a training starts
    DecodeEngine(net, dtype="fp32", rows=2)
    DecodeEngine(net, dtype="fp32", rows=2)
    assert len(compared) == 2
    net.output.weight.data.copy_(weight)
    for dtype in ("fp32", "bf16", "fp32"):
        DecodeEngine(net, dtype=dtype, rows=2)
    assert len(compared) == 3


def test_weights_that_are_no_numbers_are_not_called_uncovered(make_gpt):
    net = make_gpt()
    net.blocks[0].ffn.down.weight.data[0, 0] = float("nan")
    DecodeEngine(net, dtype="fp32", rows=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "std"), [(12, 0.02), (12, 0.2)])
def test_rounding_is_far_from_the_tolerance(make_gpt, monkeypatch, dtype, layers, std):
    monkeypatch.setitem(TOLERANCE, dtype, TOLERANCE[dtype] / 2)
    DecodeEngine(make_gpt(random=False, dim=128, num_layers=layers, vocab_size=256, init_std=std), dtype=dtype, rows=2)
    net = make_gpt(random=False, dim=128, num_layers=layers, vocab_size=256, init_std=std)
    nn.init.normal_(net.output.weight, std=0.02)
    DecodeEngine(net, dtype=dtype, rows=2)
