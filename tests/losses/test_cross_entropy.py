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
