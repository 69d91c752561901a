import torch
import torch.nn.functional as F

from smalto.nn.norm import RMSNorm


def test_equals_torch(generator):
    norm = RMSNorm(48)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(2, 7, 48, generator=generator)
    # Values of order 1; both round in float32, so a few units of 6e-8.
    torch.testing.assert_close(norm(x), F.rms_norm(x, (48,), norm.weight, eps=1e-5), atol=1e-6, rtol=1e-6)


def test_statistics_of_half_precision_are_taken_in_float32(generator):
    norm = RMSNorm(64).bfloat16()
    x = 300 * torch.randn(5, 64, generator=generator)  # squares overflow float16, and lose digits in bfloat16
    out = norm(x.bfloat16())
    exact = F.rms_norm(x.bfloat16().float(), (64,), eps=1e-5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=2**-8, atol=0)  # one rounding to 8 significant bits


def test_result_is_rounded_before_the_scale(generator):
    # The order matters for weights trained elsewhere: scaling first and rounding once gives other bits.
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    rounded = F.rms_norm(x.float(), (64,), eps=1e-5).bfloat16()
    out = norm(x)
    assert out.dtype == torch.float32  # float32 weights keep the residual stream in float32
    assert torch.equal(out, rounded * norm.weight)


def test_does_not_depend_on_the_scale_of_its_input(generator):
    x = 1 + torch.rand(4, 16, generator=generator)
    # eps = 1e-5 against mean squares above 1 leaves a relative difference below 5e-6.
    torch.testing.assert_close(RMSNorm(16)(1000 * x), RMSNorm(16)(x), rtol=1e-5, atol=0)


def test_gradient(generator):
    norm = RMSNorm(6).double()
    x = torch.randn(3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)  # finite differences need float64 all the way through
