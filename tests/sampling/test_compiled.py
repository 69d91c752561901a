"""The compiled step draws the codes of the model, for every kind of model and number of rows."""

import pytest
import torch

from smalto.sampling import compiled
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.engine import DecodeEngine, EngineConfig
from smalto.types import SamplingConfig

GUIDED = {"cfg_scale": 3.0, "cfg_interval": 4}  # the rows become half as many on the way


def draw(net, condition, mask=None, **settings):
    uniforms = uniforms_from_seeds(torch.arange(len(condition)), net.num_codes)
    return generate(net, condition, sampling=SamplingConfig(**settings), uniforms=uniforms, condition_mask=mask)


@pytest.fixture
def as_traced(monkeypatch):
    """One graph, as the compiler makes it, run by torch's own operators: seconds instead of minutes."""
    torch.compiler.reset()
    monkeypatch.setattr(
        compiled.torch,
        "compile",
        lambda function, *, mode: _compile(function, backend="aot_eager", fullgraph=True),
    )


@pytest.fixture
def as_written(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda function, *, mode: function)


_compile = torch.compile


def assert_same_codes(net, text: bool, generator) -> None:
    mask = torch.arange(5) >= torch.tensor([[0], [1], [4]]) if text else None
    condition = torch.randn(3, 5, 6, generator=generator) if text else torch.tensor([0, 5, 9])
    engine = CompiledEngine(net, dtype="fp32")
    assert torch.equal(draw(engine, condition, mask, **GUIDED), draw(net, condition, mask, **GUIDED))
    assert torch.equal(draw(engine, condition[:2], temperature=0), draw(net, condition[:2], temperature=0))


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize(
    "overrides", [{}, {"num_kv_heads": 2}, {"dim": 200, "num_heads": 2}, {"condition_rope": "identity"}]
)
@pytest.mark.parametrize("text", [False, True])
def test_codes_of_the_model(make_gpt, generator, text, overrides):
    assert_same_codes(make_gpt(text=text, **overrides), text, generator)


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("text", [False, True])
def test_codes_of_the_model_by_the_traced_graph(make_gpt, generator, text):
    assert_same_codes(make_gpt(text=text, num_layers=1, num_kv_heads=2), text, generator)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.usefixtures("as_written")
def test_logits_of_the_engine(make_gpt, dtype):
    net = make_gpt(dim=64, vocab_size=256)
    condition, codes = torch.tensor([0, 5]), torch.tensor([[3, 200], [7, 7], [255, 0]])
    found = []
    for engine in (DecodeEngine(net, dtype=dtype, rows=2), CompiledEngine(net, dtype=dtype)):
        cache = engine.new_cache(2)
        with torch.inference_mode():
            found.append(torch.stack([engine.prefill(condition, cache), *[engine.step(c, cache) for c in codes]]))
        assert cache.length == 4
    plain, other = found
    # Logits of 2 to 4 have steps of 0.016 in bfloat16; over twelve draws of weights int8 was up to three apart.
    assert (plain - other).abs().max() < 0.06 * plain.std()


@pytest.mark.slow
def test_codes_of_the_model_with_generated_code(class_gpt):
    labels = torch.tensor([0, 5, 9])
    assert torch.equal(
        draw(CompiledEngine(class_gpt, dtype="fp32"), labels, **GUIDED), draw(class_gpt, labels, **GUIDED)
    )


@pytest.mark.usefixtures("as_written")
def test_a_full_cache_is_refused(class_gpt):
    engine = CompiledEngine(class_gpt)
    assert engine.dtype in ("fp32", "bf16")  # not fp16, which no compiler sees into
    cache = engine.new_cache(1)
    cache.advance(cache.max_length)
    with pytest.raises(ValueError, match="KV cache holds 12 positions, 13 were asked for"):
        engine.step(torch.tensor([0]), cache)
    with pytest.raises(ValueError, match="choose auto, fp32, bf16 or int8"):
        EngineConfig(compile=True, dtype="fp16")
