import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from smalto.losses.adversarial import DISCRIMINATOR_LOSSES, GENERATOR_LOSSES, adaptive_weight, mean_logit

REAL, FAKE = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5])


def test_hinge():
    # Half of (0 + 0.5) / 2 + (0 + 1.5) / 2.
    assert DISCRIMINATOR_LOSSES["hinge"](REAL, FAKE).item() == 0.5
    assert GENERATOR_LOSSES["hinge"](FAKE).item() == 0.75


@pytest.mark.parametrize(("name", "factor"), [("vanilla", 0.5), ("non_saturating", 1.0)])
def test_cross_entropies(name, factor):
    loss = DISCRIMINATOR_LOSSES[name]
    zero = torch.zeros(3)
    assert loss(zero, zero).item() == pytest.approx(factor * 2 * math.log(2), rel=1e-6)
    # Logits first, target second: swapped, as in the authors' code, the value is another.
    expected = F.binary_cross_entropy_with_logits(REAL, torch.ones(2))
    expected = expected + F.binary_cross_entropy_with_logits(FAKE, torch.zeros(2))
    torch.testing.assert_close(loss(REAL, FAKE), factor * expected)


def test_non_saturating_generator():
    expected = F.binary_cross_entropy_with_logits(FAKE, torch.ones(2))
    torch.testing.assert_close(GENERATOR_LOSSES["non_saturating"](FAKE), expected)


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_discriminator_wants_real_up_and_fake_down(name):
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    DISCRIMINATOR_LOSSES[name](real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()
    assert DISCRIMINATOR_LOSSES[name](torch.full((4,), 50.0), torch.full((4,), -50.0)).item() < 1e-20


@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_generator_wants_fake_up(name):
    fake = torch.zeros(4, requires_grad=True)
    GENERATOR_LOSSES[name](fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_extreme_logits_stay_finite(name):
    assert DISCRIMINATOR_LOSSES[name](torch.tensor([-1e4, 1e4]), torch.tensor([-1e4, 1e4])).isfinite()


@pytest.mark.parametrize("name", DISCRIMINATOR_LOSSES)
def test_number_of_patches_does_not_matter(name, generator):
    real, fake = torch.randn(2, 2, 1, 3, 3, generator=generator)
    loss = DISCRIMINATOR_LOSSES[name]
    torch.testing.assert_close(loss(real.repeat(3, 1, 2, 2), fake.repeat(3, 1, 2, 2)), loss(real, fake))


def test_adaptive_weight_of_a_linear_model():
    last_layer = torch.ones(2, requires_grad=True)
    rec, adv = (last_layer * torch.tensor([3.0, 4.0])).sum(), (last_layer * torch.tensor([0.0, 0.5])).sum()
    weight = adaptive_weight(rec, adv, last_layer)
    # Gradients (3, 4) of length 5 and (0, 0.5) of length 0.5.
    assert weight.item() == pytest.approx(5 / (0.5 + 1e-4), rel=1e-6)
    assert not weight.requires_grad
    assert last_layer.grad is None, "measuring leaves no gradients behind"
    (rec + weight * adv).backward()  # the graph is still there
    torch.testing.assert_close(last_layer.grad, torch.tensor([3.0, 4.0 + 0.5 * weight.item()]))


@pytest.mark.parametrize(("rec_scale", "adv_scale", "expected"), [(3.0, 0.0, 1e4), (0.0, 1.0, 0.0)])
def test_adaptive_weight_is_bounded(rec_scale, adv_scale, expected):
    last_layer = torch.ones(1, requires_grad=True)
    weight = adaptive_weight((rec_scale * last_layer).sum(), (adv_scale * last_layer).sum(), last_layer)
    assert weight.item() == expected


@pytest.mark.parametrize("loss", [*DISCRIMINATOR_LOSSES.values(), *GENERATOR_LOSSES.values(), mean_logit])
def test_means_of_bfloat16_logits_are_float32s(loss, generator):
    number = len(inspect.signature(loss).parameters)
    logits = [torch.randn(16, 1, 30, 30, generator=generator).bfloat16() for _ in range(number)]
    found = loss(*logits)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(*(x.float() for x in logits)))
    assert loss(*(x.double() for x in logits)).dtype == torch.float64
