import math

import pytest
import torch
from torch import Tensor

from smalto.nn.attention import Attention
from smalto.nn.kv_cache import KVCache
from smalto.nn.rope import apply_rope, axial_rope


def by_definition(layer: Attention, x: Tensor, rope: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention written out, keys and values repeated for their group of queries."""
    batch, length, dim = x.shape
    sizes = [n * layer.head_dim for n in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)]
    q, k, v = (part.unflatten(-1, (-1, layer.head_dim)) for part in layer.qkv(x).split(sizes, dim=-1))
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    group = layer.num_heads // layer.num_kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(layer.head_dim)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return layer.proj(torch.einsum("bhts,bshd->bthd", weights, v).reshape(batch, length, dim))


@pytest.fixture(params=[(32, 4, None), (32, 4, 2), (32, 4, 1), (200, 2, None)], ids=["mha", "gqa", "mqa", "d100"])
def layer(request) -> Attention:
    dim, heads, kv_heads = request.param
    return Attention(dim, num_heads=heads, num_kv_heads=kv_heads).double().eval()


@pytest.fixture
def rope(layer) -> Tensor:
    return axial_rope((2, 3), layer.head_dim, prefix=1).double()


@pytest.fixture
def x(layer, generator) -> Tensor:
    return torch.randn(2, 7, layer.proj.in_features, dtype=torch.float64, generator=generator)


# In float64, so that a difference of method cannot hide behind rounding.
TIGHT = {"atol": 1e-12, "rtol": 1e-12}


def test_causal_by_default(layer, rope, x):
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, rope), by_definition(layer, x, rope, causal), **TIGHT)


def test_given_mask_replaces_the_causal_rule(layer, rope, x, generator):
    mask = (torch.rand(2, 1, 7, 7, generator=generator) < 0.5) | torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(layer(x, rope, mask=mask), by_definition(layer, x, rope, mask), **TIGHT)


@pytest.mark.parametrize("first", [1, 3])
def test_cached_equals_whole(layer, rope, x, first):
    cache = KVCache(
        num_layers=1,
        batch_size=2,
        num_kv_heads=layer.num_kv_heads,
        max_length=7,
        head_dim=layer.head_dim,
        dtype=torch.float64,
        device="cpu",
    )
    parts = []
    for start, end in [(0, first), *((i, i + 1) for i in range(first, 7))]:
        parts.append(layer(x[:, start:end], rope[start:end], cache=cache))
        cache.advance(end - start)
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, rope), **TIGHT)


@pytest.mark.parametrize(("mode", "by_content"), [("zero", False), ("identity", True)])
def test_condition_tokens_are_weighed_alike_in_zero_mode_and_by_content_in_identity_mode(mode, by_content):
    layer = Attention(4, num_heads=1)
    layer.qkv.weight.data = torch.cat([3 * torch.eye(4), 3 * torch.eye(4), torch.eye(4)])
    layer.proj.weight.data = torch.eye(4)
    x = torch.tensor([[[1.0, 0, 0, 0], [0, 1.0, 0, 0], [1.0, 0, 1.0, 0]]])  # two condition tokens and a code
    out = layer(x, axial_rope((1, 1), 4, prefix=2, prefix_mode=mode))[0, 2]
    # The code alone contributes to channel 2, as much as to channel 0: what is left are the two weights.
    first, second = (out[0] - out[2]).item(), out[1].item()
    assert (first > 10 * second) == by_content
    assert (first == pytest.approx(second, abs=1e-6)) != by_content


def test_several_positions_behind_a_filled_cache_need_a_mask(layer, rope, x):
    cache = KVCache(
        num_layers=1,
        batch_size=2,
        num_kv_heads=layer.num_kv_heads,
        max_length=7,
        head_dim=layer.head_dim,
        dtype=torch.float64,
        device="cpu",
    )
    layer(x[:, :2], rope[:2], cache=cache)
    cache.advance(2)
    with pytest.raises(AssertionError, match="need a mask"):
        layer(x[:, 2:4], rope[2:4], cache=cache)


def test_grouped_heads_cost_fewer_parameters():
    # 8 heads of 4: queries keep 32 rows, keys and values shrink from 32 to 8 each.
    assert Attention(32, num_heads=8).qkv.out_features == 96
    assert Attention(32, num_heads=8, num_kv_heads=2).qkv.out_features == 32 + 8 + 8


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, None), (4, 3)])
def test_refuses_heads_that_do_not_divide(heads, kv_heads):
    with pytest.raises(ValueError, match="divisible"):
        Attention(32, num_heads=heads, num_kv_heads=kv_heads)
