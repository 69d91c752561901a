"""Decoding with a cache gives the logits of teacher forcing."""

import pytest
import torch
from torch import Tensor

from smalto.models.gpt import GPT

VARIANTS = {
    "class": {},
    "text": {"text": True},
    "gqa": {"num_kv_heads": 2},
    "mqa text": {"num_kv_heads": 1, "text": True},
    "head_dim 100": {"dim": 200, "num_heads": 2},
    "identity rope": {"condition_rope": "identity", "text": True},
    "one code": {"code_shape": ((1, 1),)},
}
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)


def decoded(net: GPT, codes: Tensor, condition: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (B, L, V) by prefill and steps, fed with the given codes."""
    cache = net.new_cache(len(codes))
    logits = [net.prefill(condition, cache, mask)]
    logits += [net.step(codes[:, i], cache) for i in range(net.num_codes - 1)]
    assert cache.length == cache.max_length
    return torch.stack(logits, dim=1)


def example(net: GPT, generator: torch.Generator, *, text: bool) -> tuple[Tensor, Tensor]:
    codes = torch.randint(net.vocab_size, (3, net.num_codes), generator=generator)
    if text:
        return codes, torch.randn(3, 5, 6, generator=generator).to(net.output.weight.dtype)
    return codes, torch.randint(10, (3,), generator=generator)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
# float64: the methods differ by 1e-14, then decoding rounds logits of order 1 to float32 once (6e-8 each).
# float32: rounding through two layers, sums over 32 to 200 channels.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
def test_equals_teacher_forcing(make_gpt, generator, variant, masked, dtype, tolerance):
    settings = VARIANTS[variant]
    text = settings.get("text", False)
    net = make_gpt(**settings).to(dtype)
    codes, condition = example(net, generator, text=text)
    mask = (MASK if text else torch.ones(3, 1, dtype=torch.bool)) if masked else None
    expected = net(codes, condition, mask)
    actual = decoded(net, codes, condition, mask)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected.float(), atol=tolerance, rtol=0)
    if dtype == torch.float64:
        # Before that last rounding nothing has been lost.
        torch.testing.assert_close(actual, expected.float(), atol=0, rtol=2e-7)


def test_a_cache_can_be_used_again(class_gpt, generator):
    codes, condition = example(class_gpt, generator, text=False)
    cache = class_gpt.new_cache(3)
    first = class_gpt.prefill(condition, cache)
    class_gpt.step(codes[:, 0], cache)
    cache.reset()
    assert torch.equal(class_gpt.prefill(condition, cache), first)


def test_prefill_needs_an_empty_cache(class_gpt, generator):
    _, condition = example(class_gpt, generator, text=False)
    cache = class_gpt.new_cache(3)
    class_gpt.prefill(condition, cache)
    with pytest.raises(AssertionError, match=r"cache\.reset"):
        class_gpt.prefill(condition, cache)


def test_cache_is_sized_by_key_and_value_heads(make_gpt):
    net = make_gpt(num_kv_heads=2).bfloat16()
    cache = net.new_cache(7)
    assert len(cache.keys) == len(cache.values) == 2  # layers
    for buffer in cache.keys + cache.values:
        assert buffer.shape == (7, 2, 12, 8)  # batch, kv heads, condition + codes but the last, head_dim
        assert buffer.dtype == torch.bfloat16


def test_decoding_leaves_nothing_on_the_module(class_gpt, generator):
    before = {name: id(value) for name, value in class_gpt.named_buffers()}
    codes, condition = example(class_gpt, generator, text=False)
    decoded(class_gpt, codes, condition, None)
    assert {name: id(value) for name, value in class_gpt.named_buffers()} == before
    assert class_gpt.train()(codes, condition).requires_grad
