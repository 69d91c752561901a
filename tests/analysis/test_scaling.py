import dataclasses
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smalto.analysis.scaling import GPTShape
from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT

PAPER = {"vocab_size": 16_384, "num_codes": 256}
# dim, layers, heads; class-conditional parameters; text-conditional ones without the null features, as published.
PUBLISHED = {
    "B": ((768, 12, 12), 110_888_448, 112_282_368),
    "L": ((1024, 24, 16), 342_910_976, 345_031_680),
    "XL": ((1280, 36, 20), 774_699_520, 777_678_080),
    "XXL": ((1536, 48, 24), 1_410_972_672, 1_414_940_160),
    "3B": ((3200, 24, 32), 3_096_659_200, 3_110_249_600),
}
SMALL = GPTShape(dim=48, num_layers=3, num_heads=4, vocab_size=24, num_codes=12, ffn_multiple_of=16, num_classes=10)
VARIANTS = {
    "class": SMALL,
    "grouped-query": dataclasses.replace(SMALL, num_kv_heads=2),
    "wide": dataclasses.replace(SMALL, dim=64, ffn_multiple_of=256),
    "text": dataclasses.replace(SMALL, num_classes=None, text_dim=6, text_tokens=5),
    "text, null as buffer": dataclasses.replace(SMALL, num_classes=None, text_dim=6, text_tokens=5, train_null=False),
}


def built(shape: GPTShape) -> GPT:
    if shape.num_classes is not None:
        conditioner = partial(ClassConditioner, num_classes=shape.num_classes, drop_prob=0.1)
    else:
        text = {"text_dim": shape.text_dim, "num_tokens": shape.text_tokens, "train_null": shape.train_null}
        conditioner = partial(TextConditioner, drop_prob=0.1, **text)
    fields = ("dim", "num_layers", "num_heads", "vocab_size", "num_kv_heads", "ffn_multiple_of")
    sizes = {name: getattr(shape, name) for name in fields}
    with torch.device("meta"):
        return GPT(**sizes, code_shape=((3, shape.num_codes // 3),), conditioner=conditioner)


@pytest.mark.parametrize(("sizes", "by_class", "by_text"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_parameter_counts(sizes, by_class, by_text):
    dim, layers, heads = sizes
    common = {"dim": dim, "num_layers": layers, "num_heads": heads, **PAPER}
    assert GPTShape(**common, num_classes=1000).parameters == by_class
    assert GPTShape(**common, text_dim=2048, train_null=False).parameters == by_text
    assert GPTShape(**common, text_dim=2048).parameters == by_text + 120 * 2048


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameters_are_those_of_the_model(shape):
    assert shape.parameters == sum(p.numel() for p in built(shape).parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS.keys())
def test_forward_flops_are_what_torch_counts(shape):
    # On the meta device: the CPU's fused attention is an operator that torch's counter does not know.
    net, images = built(shape).eval(), 3
    codes = torch.zeros(images, shape.num_codes, dtype=torch.int64, device="meta")
    if shape.text_dim is None:
        condition = torch.zeros(images, dtype=torch.int64, device="meta")
    else:
        condition = torch.zeros(images, shape.text_tokens, shape.text_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(codes, condition)
    assert counter.get_total_flops() == images * shape.forward_flops


@pytest.mark.parametrize("name", ["grouped-query", "text"])
def test_sampling_flops_are_what_torch_counts(name):
    shape, images = VARIANTS[name], 2
    net = built(shape).to_empty(device="cpu").eval()
    net.init_weights()
    text = None if shape.text_dim is None else torch.zeros(images, shape.text_tokens, shape.text_dim)
    condition = torch.zeros(images, dtype=torch.int64) if text is None else text
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = net.new_cache(images)
        net.prefill(condition, cache)
        for _ in range(shape.num_codes - 1):
            net.step(torch.zeros(images, dtype=torch.int64), cache)
    assert counter.get_total_flops() == images * shape.sampling_flops(guided=False)
    assert shape.sampling_flops(guided=True) == 2 * shape.sampling_flops(guided=False)


def test_training_flops_are_what_torch_counts():
    net = built(VARIANTS["wide"])
    codes = torch.zeros(1, SMALL.num_codes, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(codes, torch.zeros(1, dtype=torch.int64, device="meta")).sum().backward()
    assert counter.get_total_flops() == pytest.approx(VARIANTS["wide"].training_flops, rel=0.02)


@pytest.mark.parametrize(("sizes", "by_class", "by_text"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_six_n_leaves_out_only_attention(sizes, by_class, by_text):
    dim, layers, heads = sizes
    shape = GPTShape(dim=dim, num_layers=layers, num_heads=heads, num_classes=1000, **PAPER)
    # 4 T^2 d of attention against 24 T d^2 of matrices: T / 6d, 5.6 % for B. Norms, counted in N, are far below 1 %.
    assert 1 < shape.training_flops / shape.six_n_flops < 1 + 256 / (6 * dim)


def test_shape_of_a_recorded_run():
    run = {f"params.model/{key}": value for key, value in dataclasses.asdict(SMALL).items() if value is not None}
    run |= {"params.model/code_shape": [[3, 4]], "params.model/conditioner/num_classes": 10.0}
    assert GPTShape.from_run(run | {"params.model/num_kv_heads": float("nan")}) == SMALL
    with pytest.raises(ValueError, match="model/dim"):
        GPTShape.from_run({"params.model/num_layers": 2})


@pytest.mark.parametrize(
    ("change", "said"),
    [({"dim": 50}, "num_heads"), ({"num_layers": 0}, "num_layers"), ({"num_classes": None}, "text_dim")],
)
def test_impossible_shapes_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(SMALL, **change)
