import pytest
import torch

from smalto.tokenizers import precision
from smalto.tokenizers.precision import code_agreement, decode, encode, use_bf16


@pytest.fixture
def image(generator) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1


def test_fp32_is_the_tokenizer_itself(make_vq, image):
    net = make_vq().requires_grad_(False)
    codes = encode(net, image)
    assert torch.equal(codes, net.encode(image))
    assert torch.equal(decode(net, codes), net.decode(codes))


def test_bf16_runs_convolutions_in_bf16(make_vq, image):
    net, seen = make_vq().requires_grad_(False), []
    for layer in (net.encoder.conv_out, net.decoder.conv_out):
        layer.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    codes = encode(net, image, precision="bf16")
    picture = decode(net, codes, precision="bf16")
    assert seen == [torch.bfloat16] * 2
    assert codes.dtype == torch.int64
    assert picture.dtype == torch.float32
    exact = decode(net, codes)
    assert 0 < (picture - exact).abs().max() < 0.1 * exact.abs().max().clamp(min=1)


def test_agreement_is_a_share_of_codes(make_vq, image):
    net = make_vq().requires_grad_(False)
    assert code_agreement(net, image, precision="fp32") == 1
    share = (encode(net, image) == encode(net, image, precision="bf16")).float().mean().item()
    assert code_agreement(net, image) == share


def test_auto_asks_the_device(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(precision, "has_fast_bf16", lambda device, fast=fast: fast)
        assert use_bf16("auto", "cpu") == fast
        assert use_bf16("bf16", "cpu")
        assert not use_bf16("fp32", "cpu")


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="'fp16', must be one of fp32, bf16, auto"):
        use_bf16("fp16", "cpu")
