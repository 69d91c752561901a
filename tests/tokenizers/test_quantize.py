import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.tokenizers import quantize
from smalto.tokenizers.quantize import VectorQuantizer


@pytest.fixture(params=[True, False], ids=["l2_norm", "plain"])
def quantizer(request) -> VectorQuantizer:
    net = VectorQuantizer(codebook_size=50, codebook_dim=4, l2_norm=request.param)
    torch.nn.init.normal_(net.codebook.weight)
    return net


@pytest.fixture
def latent(generator) -> Tensor:
    return torch.randn(3, 4, 5, 6, generator=generator)


def rows(latent: Tensor) -> Tensor:
    """(B, C, h, w) to (B h w, C), raster order."""
    return latent.movedim(1, -1).flatten(0, -2)


def prepared(quantizer: VectorQuantizer, latent: Tensor) -> Tensor:
    """What is compared with the entries."""
    return F.normalize(rows(latent), dim=-1) if quantizer.l2_norm else rows(latent)


def test_codes_are_the_nearest_entries(quantizer, latent):
    distance = torch.cdist(prepared(quantizer, latent).double(), quantizer.entries().double())
    nearest_two = distance.topk(2, largest=False).values
    assert (nearest_two[:, 1] - nearest_two[:, 0]).min() > 1e-5, "the example must have no ties within float32"
    assert torch.equal(quantizer(latent).codes.flatten(), distance.argmin(1))


def test_first_of_equal_entries_wins(quantizer, latent):
    quantizer.codebook.weight.data[25:] = quantizer.codebook.weight.data[:25]
    assert quantizer(latent).codes.max() < 25


def test_chunks_change_nothing(quantizer, latent, monkeypatch):
    whole = quantizer(latent).codes
    monkeypatch.setitem(quantize.LOOKUP_ROWS, "cpu", 7)  # 90 latents: 12 chunks and a rest
    assert torch.equal(quantizer(latent).codes, whole)


def test_output_is_the_chosen_entry_in_raster_order(quantizer, latent):
    out = quantizer(latent)
    assert out.codes.shape == (3, 30)
    assert out.codes.dtype == torch.int64
    looked_up = quantizer.lookup(out.codes).view(3, 5, 6, 4).movedim(-1, 1)
    # z + (q - z) rounds twice around values of order 1.
    torch.testing.assert_close(out.latent, looked_up, atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e6])
def test_codes_stay_in_range(quantizer, latent, scale):
    codes = quantizer(scale * latent).codes
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 50


def test_every_entry_can_be_reached(quantizer):
    entries = quantizer.entries().detach()
    out = quantizer(entries.T.reshape(1, 4, 5, 10))
    assert torch.equal(out.codes, torch.arange(50).unsqueeze(0))
    assert out.codebook_loss.item() < 1e-12  # each latent is its entry, up to rounding of the normalisation


def test_stored_length_of_an_entry_does_not_matter(latent):
    quantizer = VectorQuantizer(codebook_size=50, codebook_dim=4)
    before = quantizer(latent)
    quantizer.codebook.weight.data *= torch.linspace(0.1, 9, 50).unsqueeze(1)
    after = quantizer(latent)
    assert torch.equal(after.codes, before.codes)
    torch.testing.assert_close(after.latent, before.latent)
    torch.testing.assert_close(after.latent.norm(dim=1), torch.ones(3, 5, 6))


def test_gradient_passes_straight_through(quantizer, latent, generator):
    upstream = torch.randn(latent.shape, generator=generator)
    x = latent.clone().requires_grad_()
    (quantizer(x).latent * upstream).sum().backward()
    y = latent.clone().requires_grad_()
    seen = F.normalize(y, dim=1) if quantizer.l2_norm else y
    (seen * upstream).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    if not quantizer.l2_norm:
        assert torch.equal(x.grad, upstream)
    assert quantizer.codebook.weight.grad is None


def test_losses_in_closed_form(quantizer, latent):
    out = quantizer(latent)
    z, q = prepared(quantizer, latent), quantizer.entries()[out.codes.flatten()]
    expected = (z - q).pow(2).mean()
    torch.testing.assert_close(out.codebook_loss, expected)
    torch.testing.assert_close(out.commitment_loss, 0.25 * expected)
    torch.testing.assert_close(out.loss, 1.25 * expected)


def test_each_loss_pulls_one_side(quantizer, latent):
    latent.requires_grad_()
    weight = quantizer.codebook.weight
    out = quantizer(latent)
    of_codebook = torch.autograd.grad(out.codebook_loss, [latent, weight], allow_unused=True, retain_graph=True)
    of_commitment = torch.autograd.grad(out.commitment_loss, [latent, weight], allow_unused=True)
    assert of_codebook[0] is None
    assert of_commitment[1] is None
    assert of_codebook[1].abs().sum() > 0
    assert of_commitment[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        ([[1.0, 0.0], [-1.0, 0.0]], -math.log(2)),  # confident, evenly used: 0 - ln 2, the best there is
        ([[1.0, 0.0], [1.0, 0.0]], 0.0),  # confident, one entry only: 0 - 0
        ([[0.0, 1.0], [0.0, -1.0]], 0.0),  # undecided: ln 2 - ln 2
    ],
)
def test_entropy_of_two_entries(latents, expected):
    quantizer = VectorQuantizer(codebook_size=2, codebook_dim=2, entropy_weight=3.0)
    entries = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    quantizer.codebook.weight.data.copy_(entries)
    # The 1e-5 inside the logarithm of the mean shifts it by 2e-5 at most.
    assert quantizer.entropy(torch.tensor(latents), entries).item() == pytest.approx(expected, abs=3e-5)
    out = quantizer(torch.tensor(latents).T.reshape(1, 2, 1, 2))
    assert out.entropy_loss.item() == pytest.approx(3 * expected, abs=1e-4)


def test_entropy_by_definition(latent):
    quantizer = VectorQuantizer(codebook_size=50, codebook_dim=4, entropy_weight=1.0, entropy_temperature=0.5).double()
    z, entries = F.normalize(rows(latent), dim=-1).double(), quantizer.entries().double()
    p = torch.softmax(-torch.cdist(z, entries).pow(2) / 0.5, dim=-1)
    mean = p.mean(0)
    expected = -(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()
    # The authors' 1e-5 inside the second logarithm: 1e-5 per entry of probability 1/50.
    torch.testing.assert_close(quantizer.entropy(z, entries), expected, atol=6e-4, rtol=0)


def test_entropy_is_not_computed_at_weight_zero(latent, monkeypatch):
    quantizer = VectorQuantizer(codebook_size=50, codebook_dim=4)
    monkeypatch.delattr(VectorQuantizer, "entropy")  # any use would raise
    assert quantizer(latent).entropy_loss == 0


def test_autocast_does_not_change_codes(quantizer, latent):
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(latent)
    assert torch.equal(out.codes, quantizer(latent).codes)
    assert out.codebook_loss.dtype == torch.float32


def test_half_precision_latents_keep_their_dtype(quantizer, latent):
    out = quantizer(latent.bfloat16())
    assert out.latent.dtype == torch.bfloat16
    assert torch.equal(out.codes, quantizer(latent.bfloat16().float()).codes)


def test_initial_codebook():
    plain = VectorQuantizer(codebook_size=1000, codebook_dim=8, l2_norm=False).codebook.weight.detach()
    assert plain.abs().max() <= 1e-3
    assert plain.abs().mean() == pytest.approx(5e-4, rel=0.05)  # 8000 draws: standard error 0.6 %
    unit = VectorQuantizer(codebook_size=1000, codebook_dim=8).codebook.weight
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(1000))


@pytest.mark.parametrize(
    "wrong",
    [
        {"codebook_size": 1},
        {"codebook_dim": 0},
        {"commitment_weight": -1.0},
        {"entropy_weight": -0.1},
        {"entropy_temperature": 0.0},
    ],
)
def test_refuses_settings_that_make_no_sense(wrong):
    key, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=rf"{key} (is |\(){value}"):
        VectorQuantizer(**{"codebook_size": 8, "codebook_dim": 2} | wrong)
