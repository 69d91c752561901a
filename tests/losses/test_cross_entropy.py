import pytest
import torch
import torch.nn.functional as F

from smalto.losses.cross_entropy import linear_cross_entropy

N, C, V = 23, 8, 50


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("rows", [1, 7, 23, 100])
def test_loss_and_gradients_are_those_of_all_logits(rows):
    hidden, weight, targets = inputs()
    plain = F.cross_entropy(hidden @ weight.T, targets)
    wanted = torch.autograd.grad(3 * plain, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, rows=rows)
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (hidden, weight)), wanted, rtol=1e-10, atol=1e-14)


def test_only_the_wanted_gradient_is_made():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden.detach(), weight, targets, rows=5)
    loss.backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, rows=5), loss)


def test_under_autocast_products_are_bfloat16_and_the_loss_is_not():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        plain = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        loss = linear_cross_entropy(hidden, weight, targets, rows=5)
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, plain, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.dtype == torch.float32
    # rounding of the products: 2^-8 of gradients of at most 0.15
    torch.testing.assert_close(gradient, torch.autograd.grad(plain, weight)[0], rtol=0.02, atol=1e-3)


def test_in_float16_nothing_is_lost_below_its_range():
    """Probabilities of 1/V over N rows are 2^-24 here, where float16 ends; the loss scale comes afterwards."""
    rows, vocabulary, scale = 1024, 16384, 2.0**16
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, C, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, C, generator=generator)).half().float().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(hidden, weight, targets, rows=256)
    found = torch.autograd.grad(scale * loss, (hidden, weight))
    exact = hidden.detach().half().double().requires_grad_(), weight.detach().double().requires_grad_()
    wanted = torch.autograd.grad(scale * F.cross_entropy(exact[0] @ exact[1].T, targets), exact)
    for gradient, right in zip(found, wanted, strict=True):
        assert (gradient - right).norm() < 2**-10 * right.norm()
