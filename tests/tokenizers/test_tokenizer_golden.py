"""Both tokenizers against what the authors' code computes for the same weights."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from golden_weights import Golden, golden_image, golden_tokenizer, load_golden, tokenizer_name
from smalto.tokenizers.quantize import QuantizerOutput
from smalto.tokenizers.vqgan import VQModel

# float32 in two implementations: values of order 1 through some forty layers.
CLOSE = {"atol": 1e-4, "rtol": 0}


@dataclass(frozen=True)
class Case:
    golden: Golden
    net: VQModel
    latent: Tensor
    reconstruction: Tensor
    quantized: QuantizerOutput


@pytest.fixture(scope="module", params=["tokenizer_vq16", "tokenizer_vq8"])
def case(request) -> Case:
    golden = load_golden(request.param)
    net = golden_tokenizer(golden)
    latent = net.quant_conv(net.encoder(golden_image(golden)))
    quantized = net.quantizer(latent)
    reconstruction = net.decode_latent(quantized.latent)
    (reconstruction.pow(2).mean() + quantized.loss).backward()
    return Case(golden, net, latent.detach(), reconstruction.detach(), quantized)


def test_number_of_parameters(case):
    assert sum(p.numel() for p in case.net.parameters()) == case.golden.description["n_params"]


def test_latent(case):
    torch.testing.assert_close(case.latent, case.golden.tensor("latent"), **CLOSE)


def test_codes(case):
    assert torch.equal(case.quantized.codes.flatten(), case.golden.tensor("codes"))
    assert torch.equal(case.net.encode(golden_image(case.golden)), case.quantized.codes)


def test_quantized_latent(case):
    torch.testing.assert_close(case.quantized.latent, case.golden.tensor("quantized"), **CLOSE)


def test_reconstruction(case):
    torch.testing.assert_close(case.reconstruction, case.golden.tensor("reconstruction"), **CLOSE)


def test_decoded_codes(case):
    with torch.inference_mode():
        image = case.net.decode(case.golden.tensor("codes").unsqueeze(0))
    torch.testing.assert_close(image, case.golden.tensor("decoded_codes"), **CLOSE)


@pytest.mark.parametrize("name", ["vq_loss", "commitment_loss", "entropy_loss"])
def test_losses(case, name):
    ours = {"vq_loss": "codebook_loss"}.get(name, name)
    # Losses of order 0.01 to 0.1, from latents that agree within 1e-5.
    assert getattr(case.quantized, ours).item() == pytest.approx(float(case.golden.arrays[name]), abs=1e-6)


def test_gradient_norms(case):
    expected = case.golden.gradient_norms(tokenizer_name)
    parameters = dict(case.net.named_parameters())
    assert expected.keys() == parameters.keys()
    zero = {name for name, norm in expected.items() if norm < 1e-6}
    # The softmax over keys does not see a constant added to all of them: these gradients are rounding noise.
    assert zero == {name for name in expected if name.endswith(".k.bias")}
    for name in expected.keys() - zero:
        assert float(parameters[name].grad.norm()) == pytest.approx(expected[name], rel=1e-3), name
    assert all(float(parameters[name].grad.norm()) < 1e-6 for name in zero)
