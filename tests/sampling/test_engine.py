"""The decode engine computes what the model computes, for whatever model, and images know no neighbours."""

import pytest
import torch
from torch import Tensor

from smalto.models.gpt import GPT
from smalto.sampling import packed
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.engine import DecodeEngine, EngineConfig
from smalto.sampling.packed import packed_linear, resolve_dtype
from smalto.types import SamplingConfig
from torch_threads import on_threads

SEEDS = torch.arange(21, 28)
LABELS = torch.tensor([0, 3, 3, 9, 5, 1, 7])
CPU = torch.device("cpu")
HAS_FP16 = packed._has_fp16()
ROUND_ALIKE = ["fp32", "int8", *(["fp16"] if HAS_FP16 else [])]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0, "cfg_scale": 3.0},
    {"cfg_scale": 3.0},
    {"cfg_scale": 3.0, "cfg_interval": 0},
    {"cfg_scale": 3.0, "cfg_interval": 4},
    {"cfg_scale": 1.5, "top_k": 5, "top_p": 0.8, "temperature": 0.7},
]


def sample(net, condition: Tensor, mask: Tensor | None = None, seeds: Tensor = SEEDS, **settings) -> Tensor:
    uniforms = uniforms_from_seeds(seeds, net.num_codes)
    return generate(net, condition, sampling=SamplingConfig(**settings), uniforms=uniforms, condition_mask=mask)


def texts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Seven texts of 1 to 5 tokens, padded on the left."""
    mask = torch.arange(5) >= torch.tensor([[0], [1], [2], [3], [4], [0], [2]])
    return torch.randn(7, 5, 6, generator=generator) * mask.unsqueeze(-1), mask


def step_logits(net, condition: Tensor, codes: Tensor, mask: Tensor | None = None) -> Tensor:
    """Teacher-forced logits (B, L, V), one step after another."""
    cache = net.new_cache(len(codes))
    with torch.inference_mode():
        logits = [net.prefill(condition, cache, mask)]
        logits += [net.step(codes[:, i], cache) for i in range(codes.shape[1] - 1)]
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("text", [False, True])
def test_fp32_draws_the_codes_of_the_model(make_gpt, generator, text, settings):
    net = make_gpt(text=text)
    condition, mask = texts(generator) if text else (LABELS, None)
    engine = DecodeEngine(net, dtype="fp32", rows=14)
    assert torch.equal(sample(engine, condition, mask, **settings), sample(net, condition, mask, **settings))


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_kv_heads": 1},
        {"num_kv_heads": 2},
        {"dim": 200, "num_heads": 2},  # head size 100, as the authors' 3B
        {"num_layers": 1, "code_shape": ((5, 3),)},
        {"condition_rope": "identity"},
        {"norm_eps": 0.3},
        {"vocab_size": 7, "ffn_multiple_of": 24},
    ],
)
@pytest.mark.parametrize("text", [False, True])
def test_every_model_shape(make_gpt, generator, text, overrides):
    net = make_gpt(text=text, **overrides)
    condition, mask = texts(generator) if text else (LABELS, None)
    codes = torch.randint(net.vocab_size, (7, net.num_codes), generator=generator)
    engine = DecodeEngine(net, dtype="fp32", rows=7)
    expected = step_logits(net, condition, codes, mask)
    assert (step_logits(engine, condition, codes, mask) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 2e-2), ("int8", 3e-2)])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_fewer_bits_stay_close(make_gpt, generator, dtype, tolerance, num_kv_heads):
    if dtype == "fp16" and not HAS_FP16:
        pytest.skip("no FBGEMM")
    net = make_gpt(dim=64, vocab_size=256, num_kv_heads=num_kv_heads)
    codes = torch.randint(net.vocab_size, (7, net.num_codes), generator=generator)
    logits, expected = (step_logits(n, LABELS, codes) for n in (DecodeEngine(net, dtype=dtype, rows=7), net))
    assert logits.dtype == torch.float32
    assert (logits - expected).square().mean().sqrt() < tolerance * expected.std()
    # Not float32 under another name.
    assert (logits - expected).abs().max() > 1e-2 * tolerance * expected.std()


@pytest.fixture(params=[1, 2])
def threads(request):
    """Kernels share work out by threads; what a row's result is must not depend on where it falls."""
    yield from on_threads(request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ROUND_ALIKE)
@pytest.mark.parametrize("text", [False, True])
def test_rows_come_out_bit_for_bit_whatever_their_number(make_gpt, generator, text, dtype):
    # Kernels add in blocks of 1024 products: the feed-forward layer has more.
    net = make_gpt(text=text, dim=128, vocab_size=300, ffn_multiple_of=1040)
    condition, mask = texts(generator) if text else (LABELS, None)
    many = torch.arange(40) % 7
    codes = torch.randint(300, (7, 12), generator=generator)
    engine = DecodeEngine(net, dtype=dtype, rows=14)

    def logits(rows: Tensor) -> Tensor:
        return step_logits(engine, condition[rows], codes[rows], None if mask is None else mask[rows])

    together = logits(many)
    for count in (1, 2, 3, 4, 7, 8, 13, 14, 31, 32, 37):
        assert torch.equal(logits(many[:count]), together[:count]), count
    assert torch.equal(logits(many.flip(0)), together.flip(0))
    # Engines laid out for other numbers of rows give the same, too.
    for laid_out in (1, 2, 3):
        engine = DecodeEngine(net, dtype=dtype, rows=laid_out)
        assert torch.equal(logits(many[:1]), together[:1]), laid_out
        assert torch.equal(logits(many[:3]), together[:3]), laid_out


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ROUND_ALIKE)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_image_depends_on_its_seed_and_label_only(make_gpt, dtype, scale):
    net = make_gpt(dim=128, vocab_size=300)
    settings = {"cfg_scale": scale, "cfg_interval": 5}
    rows = 2 if scale > 1 else 1
    engine, small = DecodeEngine(net, dtype=dtype, rows=7 * rows), DecodeEngine(net, dtype=dtype, rows=rows)
    together = sample(engine, LABELS, **settings)
    alone = [sample(small, LABELS[i : i + 1], seeds=SEEDS[i : i + 1], **settings) for i in range(7)]
    assert torch.equal(torch.cat(alone), together)
    order = torch.tensor([4, 2, 6, 0, 3, 1, 5])
    assert torch.equal(sample(engine, LABELS[order], seeds=SEEDS[order], **settings), together[order])


def test_the_model_and_the_arguments_stay_as_they_are(text_gpt, generator):
    text, mask = texts(generator)
    before = {name: value.clone() for name, value in text_gpt.state_dict().items()}
    arguments = [text, mask, SEEDS]
    copies = [value.clone() for value in arguments]
    engine = DecodeEngine(text_gpt, rows=14)
    sample(engine, text, mask, cfg_scale=3.0, cfg_interval=2, top_k=4, top_p=0.9)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in text_gpt.state_dict().items())


def test_no_unconditional_rows_without_guidance_or_behind_the_interval(class_gpt):
    engine = DecodeEngine(class_gpt, rows=14)
    rows: list[int] = []
    step = engine.step
    engine.step = lambda codes, cache: rows.append(len(codes)) or step(codes, cache)
    sample(engine, LABELS)
    assert rows == [7] * 11
    rows.clear()
    sample(engine, LABELS, cfg_scale=2.0, cfg_interval=3)
    assert rows == [14] * 4 + [7] * 7


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_private_operators(class_gpt, monkeypatch, dtype):
    expected = sample(DecodeEngine(class_gpt, dtype=dtype, rows=7), LABELS, temperature=0)
    monkeypatch.setattr(packed, "_has_onednn", lambda dtype: False)
    monkeypatch.setattr(packed, "_has_fp16", lambda: False)
    assert resolve_dtype("auto", CPU) == "fp32"
    assert isinstance(packed_linear(torch.zeros(4, 4), dtype=dtype, rows=2), packed._PlainLinear)
    assert torch.equal(sample(DecodeEngine(class_gpt, dtype=dtype, rows=7), LABELS, temperature=0), expected)
    with pytest.raises(ValueError, match="choose auto, fp32, bf16 or int8"):
        resolve_dtype("fp16", CPU)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("shape", [(3, 32), (2, 5, 33)])  # int8 kernels read past the end of odd rows
@pytest.mark.parametrize("rows", [3, None])
def test_packed_linear_is_linear(generator, dtype, shape, rows):
    if dtype == "fp16" and not (HAS_FP16 and rows):
        pytest.skip("no FBGEMM")
    weight, x = torch.randn(48, shape[-1], generator=generator), torch.randn(shape, generator=generator)
    weight[7] = 0
    out = packed_linear(weight, dtype=dtype, rows=rows)(x.bfloat16() if dtype == "bf16" else x)
    assert out.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
    torch.testing.assert_close(out.float(), x @ weight.T, rtol=0.02, atol=0.15 if dtype in ("bf16", "int8") else 0.01)
    assert (out[..., 7] == 0).all()


@pytest.mark.skipif(not HAS_FP16, reason="no FBGEMM")
def test_weights_beyond_half_precision_are_refused():
    with pytest.raises(ValueError, match=r"7e\+04 does not fit in fp16"):
        packed_linear(torch.full((2, 2), 7e4), dtype="fp16", rows=1)


def test_unknown_dtype_is_named_with_the_valid_ones():
    for make in (lambda: resolve_dtype("fp8", CPU), lambda: EngineConfig(dtype="fp8")):
        with pytest.raises(ValueError, match=r"engine\.dtype is 'fp8', choose one of auto, fp32, bf16, fp16, int8"):
            make()
    with pytest.raises(ValueError, match="on cuda"):
        resolve_dtype("fp16", torch.device("cuda"))


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16", "int8"])
def test_the_recorded_dtype_is_the_one_that_computes(class_gpt, monkeypatch, dtype):
    """On a processor with fp16 kernels and without bfloat16 in hardware, ``auto`` is fp16, but not for a compiler."""
    monkeypatch.setattr(packed, "bf16_units", lambda device: None)
    for compiled, engine in (
        (False, DecodeEngine(class_gpt, dtype=dtype, rows=2)),
        (True, CompiledEngine(class_gpt, dtype=dtype)),
    ):
        assert EngineConfig(dtype=dtype, compile=compiled).computes_in(CPU) == engine.dtype != "auto"


def test_a_model_in_training_decodes_like_one_that_is_not(make_gpt):
    """Dropout is not part of the engine."""
    net: GPT = make_gpt(resid_dropout=0.5, ffn_dropout=0.5)
    expected = sample(net, LABELS, temperature=0)
    net.train()
    net.conditioner.eval()
    assert torch.equal(sample(DecodeEngine(net, dtype="fp32", rows=7), LABELS, temperature=0), expected)
