"""The compiled step draws the codes of the model, for every kind of model and number of rows, and copies nothing."""

import weakref
from collections import Counter
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.utils._python_dispatch import TorchDispatchMode

from smalto.sampling import compiled
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.sampling.compiled import CompiledEngine
from smalto.sampling.engine import DecodeEngine, EngineConfig
from smalto.types import SamplingConfig

GUIDED = {"cfg_scale": 3.0, "cfg_interval": 4}  # the rows become half as many on the way
FILTERED = {"cfg_scale": 2.0, "top_k": 9, "top_p": 0.9, "temperature": 0.8}
LABELS = torch.tensor([0, 5, 9])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def draw(net, condition=LABELS, mask=None, **settings):
    uniforms = uniforms_from_seeds(torch.arange(len(condition)), net.num_codes)
    return generate(net, condition, sampling=SamplingConfig(**settings), uniforms=uniforms, condition_mask=mask)


_compile = torch.compile


@pytest.fixture
def as_written(monkeypatch):
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **settings: function)


@pytest.fixture
def graphs(monkeypatch):
    """Graphs as inductor lowers them, run by torch's own operators: seconds instead of minutes; each is noted here."""
    torch.compiler.reset()
    found: list[torch.fx.GraphModule] = []

    def lower(graph, inputs):
        static = TracingContext.get().fw_metadata.static_input_indices
        graph.inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        assert all(isinstance(value, torch.Tensor) for value in graph.inputs), "a size or number is no constant"
        graph.moving = sum(value.nbytes for i, value in enumerate(graph.inputs) if i not in static)
        with V.set_fake_mode(graph.inputs[0].fake_mode):
            post_grad_passes(graph, is_inference=True)
        found.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lower, decompositions=select_decomp_table(), keep_inference_input_mutations=True)
    monkeypatch.setattr(
        compiled.torch,
        "compile",
        lambda function, *, mode, **settings: _compile(function, backend=backend, **settings),
    )
    yield found
    torch.compiler.reset()


def assert_same_codes(net, text: bool, generator) -> None:
    mask = torch.arange(5) >= torch.tensor([[0], [1], [4]]) if text else None
    condition = torch.randn(3, 5, 6, generator=generator) if text else LABELS
    engine = CompiledEngine(net, dtype="fp32")
    for settings in (GUIDED, FILTERED):
        assert torch.equal(draw(engine, condition, mask, **settings), draw(net, condition, mask, **settings))
    assert torch.equal(draw(engine, condition[:2], temperature=0), draw(net, condition[:2], temperature=0))


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize(
    "overrides", [{}, {"num_kv_heads": 2}, {"dim": 200, "num_heads": 2}, {"condition_rope": "identity"}]
)
@pytest.mark.parametrize("text", [False, True])
def test_codes_of_the_model(make_gpt, generator, text, overrides):
    assert_same_codes(make_gpt(text=text, **overrides), text, generator)


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize("text", [False, True])
def test_codes_of_the_model_by_the_traced_graph(make_gpt, generator, text):
    assert_same_codes(make_gpt(text=text, num_layers=1, num_kv_heads=2), text, generator)


@pytest.mark.slow
def test_codes_of_the_model_with_generated_code(class_gpt):
    assert torch.equal(draw(CompiledEngine(class_gpt, dtype="fp32"), **GUIDED), draw(class_gpt, **GUIDED))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.usefixtures("as_written")
def test_sums_of_the_engine(make_gpt, dtype, monkeypatch):
    """Logits that differ by a rounding have sums that do, as long as the codes before are the same."""
    net = make_gpt(dim=64, vocab_size=256)
    found = []
    monkeypatch.setattr("smalto.sampling.autoregressive._check_finite", lambda sums: found.append(sums.clone()))
    codes = [draw(engine) for engine in (DecodeEngine(net, dtype=dtype, rows=3), CompiledEngine(net, dtype=dtype))]
    alike = (codes[0] == codes[1]).cumprod(1).sum(1).clamp(max=net.num_codes - 1)
    assert alike.sum() > 6
    for plain, other, upto in zip(*found, alike.tolist(), strict=True):
        assert (plain - other)[: upto + 1].abs().max() < 0.1 * found[0].std()


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
@pytest.mark.parametrize("text", [False, True])
def test_all_inputs_but_the_position_stay_where_they_are(make_gpt, generator, graphs, text, dtype):
    """A CUDA graph copies the others in every replay."""
    net = make_gpt(text=text, num_kv_heads=2)
    condition = torch.randn(3, 5, 6, generator=generator) if text else LABELS
    draw(CompiledEngine(net, dtype=dtype), condition, torch.ones(3, 5, dtype=torch.bool) if text else None, **GUIDED)
    assert len(graphs) == 2
    for graph in graphs:
        assert graph.moving == 8
        assert sum(value.nbytes for value in graph.inputs) > 2**14  # the weights are among them
        assert {value.device.type for value in graph.inputs} == {"cpu"}


def test_nothing_is_copied_to_change_a_cache(make_gpt, graphs):
    draw(CompiledEngine(make_gpt(num_layers=3), dtype="fp32"), cfg_scale=2.0)
    (graph,) = graphs
    calls = Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    assert calls["aten.index_put_.default"] == 2 * 3 + 2  # keys and values of the layers; codes and sums
    whole = (6, 4, 12, 8)  # of keys or values of a layer
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, torch.Tensor) and value.shape == whole:
            assert str(node.target) in {"aten.index_put_.default", "aten.slice.Tensor", "aten.copy_.default"}, node
            assert "copy_" not in str(node.target) or node.args[0].op != "placeholder", "a cache is written as a whole"


def test_graphs_are_compiled_once_for_all_batches_and_engines(make_gpt, graphs, monkeypatch):
    monkeypatch.setattr(compiled, "_LENGTH_MULTIPLE", 1)  # parts of 3 of 12 positions
    net = make_gpt(num_layers=1)
    engine = CompiledEngine(net, dtype="fp32")
    assert torch.equal(draw(engine, **GUIDED), draw(net, **GUIDED))
    # Codes 1 to 5 by 6 rows, which fills positions up to 6, the others by 3 rows: lengths 3, 6 and 9, 12.
    assert len(graphs) == 4
    for scale, temperature in ((1.5, 1.0), (2.0, 0.3), (7.0, 2.0)):
        settings = {"cfg_scale": scale, "cfg_interval": 4, "temperature": temperature}
        assert torch.equal(draw(engine, **settings), draw(net, **settings))
    net.output.weight.data.normal_()
    assert torch.equal(draw(CompiledEngine(net, dtype="fp32"), **GUIDED), draw(net, **GUIDED))
    assert len(graphs) == 4
    draw(engine, LABELS[:2])
    assert len(graphs) == 4 + 4


def test_no_number_of_graphs_is_too_many_for_the_compiler(make_gpt, graphs):
    """Its own limit is 8; beyond, it computes without compiling, or not at all."""
    engine = CompiledEngine(make_gpt(num_layers=1, code_shape=((1, 2),)), dtype="fp32")
    with torch._dynamo.config.patch(recompile_limit=1):
        for k in (1, 2, 3):
            draw(engine, top_k=k)
    assert len(graphs) == 3


@pytest.mark.usefixtures("as_written")
def test_batches_share_their_memory(text_gpt, generator):
    text = torch.randn(4, 5, 6, generator=generator)
    mask = torch.ones(4, 5, dtype=torch.bool)
    engine = CompiledEngine(text_gpt, dtype="fp32")
    assert engine.held_bytes == 0

    def places(rows: int) -> list[int]:
        draw(engine, text[:rows], mask[:rows], **GUIDED)
        return [buffer.data_ptr() for buffer in engine._buffers.values()]

    first = places(3)
    held = engine.held_bytes
    assert held > 2 * 2 * 6 * 4 * 16 * 8 * 4
    assert places(3) == places(2) == first
    assert engine.held_bytes == held
    places(4)
    assert held < engine.held_bytes <= 4 / 3 * held + 100


def test_a_broken_batch_does_not_break_the_next(class_gpt, graphs):
    engine = CompiledEngine(class_gpt, dtype="fp32")
    expected = draw(engine)
    engine.output.weight[3] = torch.nan
    engine.layers[0].qkv.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite .* for 3 of 3 images, from code 0 on"):
        draw(engine)
    fresh = CompiledEngine(class_gpt, dtype="fp32")
    fresh._buffers = engine._buffers
    assert torch.equal(draw(fresh), expected)


class Fetches(TorchDispatchMode):
    """Counts values that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in {"_local_scalar_dense", "item", "is_nonzero", "nonzero"}
        return func(*args, **kwargs or {})


@pytest.mark.usefixtures("as_written")
@pytest.mark.parametrize("make", [CompiledEngine, partial(DecodeEngine, rows=6), lambda net, dtype: net])
def test_the_host_reads_one_value_for_a_batch(class_gpt, make):
    """Whether all logits were finite: in no step does it wait for the device."""
    engine = make(class_gpt, dtype="fp32")
    draw(engine)
    with Fetches() as fetches:
        draw(engine, **GUIDED, top_k=5)
    assert fetches.count == 1


def test_codes_do_not_change_when_others_are_drawn(class_gpt, graphs):
    engine = CompiledEngine(class_gpt, dtype="fp32")
    codes = draw(engine)
    copy = codes.clone()
    draw(engine, LABELS.flip(0))
    assert torch.equal(codes, copy)


def test_an_engine_goes_with_its_last_user(class_gpt, graphs):
    """The compiler keeps its graphs, but neither weights nor caches."""
    engine = CompiledEngine(class_gpt, dtype="fp32")
    draw(engine)
    kept = [weakref.ref(engine), weakref.ref(engine.layers[0].qkv.weight), weakref.ref(engine._buffers["keys 0"])]
    del engine
    assert [ref() for ref in kept] == [None, None, None]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", [False, True])
def test_graphs_replay_on_a_gpu_without_waiting(make_gpt, generator, text, monkeypatch):
    net = make_gpt(text=text, dim=128, num_kv_heads=2).cuda()
    condition = (torch.randn(3, 5, 6, generator=generator) if text else LABELS).cuda()
    mask = (torch.arange(5) >= torch.tensor([[0], [1], [4]])).cuda() if text else None
    engine = CompiledEngine(net, dtype="fp32")
    expected = draw(net, condition, mask, **GUIDED)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):  # the first compiles, the second records
        assert torch.equal(draw(engine, condition, mask, **GUIDED), expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    write = engine.write

    def write_without_waiting(*arguments) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            write(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine, "write", write_without_waiting)
    assert torch.equal(draw(engine, condition, mask, **GUIDED), expected)


@pytest.mark.usefixtures("as_written")
def test_a_full_cache_is_refused(class_gpt):
    engine = CompiledEngine(class_gpt)
    assert engine.dtype in ("fp32", "bf16")  # not fp16, which no compiler sees into
    cache = engine.new_cache(1)
    draft = engine.new_draft(torch.zeros(1, 12), SamplingConfig())
    cache.advance(cache.max_length)
    with pytest.raises(ValueError, match="KV cache holds 12 positions, 13 were asked for"):
        engine.write(draft, 11, cache)


def test_where_auto_compiles(monkeypatch):
    for kernels in (False, True):
        monkeypatch.setattr("smalto.sampling.engine._has_triton", lambda kernels=kernels: kernels)
        assert EngineConfig().compiles(CUDA) == kernels
        assert not EngineConfig().compiles(CPU)
    for device in (CPU, CUDA):
        assert EngineConfig(compile=True).compiles(device)
        assert not EngineConfig(compile=False).compiles(device)


def test_what_does_not_compile_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="choose auto, fp32, bf16 or int8"):
        EngineConfig(compile=True, dtype="fp16")
    EngineConfig(dtype="fp16")
    with pytest.raises(ValueError, match=r"engine\.compile is 'maybe', must be auto, true or false"):
        EngineConfig(compile="maybe")
    monkeypatch.setattr("smalto.sampling.engine._has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"choose engine\.dtype=bf16, or engine\.compile=true where Triton"):
        EngineConfig(dtype="int8").computes_in(CUDA)
    assert EngineConfig(dtype="int8", compile=True).computes_in(CUDA) == "int8"
    assert EngineConfig(dtype="int8").computes_in(CPU) == "int8"
