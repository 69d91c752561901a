"""Rows come out the same bit for bit whatever rows lie beside them: vectors, what is left of them, threads."""

import pytest
import torch
import torch.nn.functional as F

from smalto.nn.rope import apply_rope, axial_rope
from smalto.sampling.alike import gated, gelu, norm, turned
from torch_threads import on_threads

TABLE = axial_rope((3, 4), 36, prefix=2, prefix_mode="identity")[4:9]
FACTORS = torch.view_as_complex(TABLE).unsqueeze(1)
FLOOR = torch.tensor(0.7)
FUNCTIONS = {  # of rows (N, 180): ours, and what it stands for
    "gated": (gated, lambda x: F.silu(x[:, :90]) * x[:, 90:]),
    "gelu": (gelu, lambda x: F.gelu(x, approximate="tanh")),
    "norm": (lambda x: norm(x, FLOOR.to(x.dtype)), lambda x: (x.square().sum(1, keepdim=True) + 0.49).sqrt()),
    "turned": (
        lambda x: turned(x.clone().view(-1, 5, 1, 36), FACTORS),
        lambda x: apply_rope(x.view(-1, 5, 1, 36), TABLE.to(x.dtype)),
    ),
}


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    yield from on_threads(request.param)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_knows_no_neighbours(generator, name):
    function, _ = FUNCTIONS[name]
    x = 4 * torch.randn(1001, 180, generator=generator)  # several times what torch shares out among threads
    together = function(x)
    for start, stop in ((0, 1), (1, 4), (3, 11), (17, 57), (0, 400), (9, 746), (990, 1001), (1, 1001), (0, 370)):
        assert torch.equal(function(x[start:stop].clone()), together[start:stop]), (start, stop)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [0, 1, 5, 400])
def test_they_are_the_functions_they_stand_for(generator, name, rows):
    function, expected = FUNCTIONS[name]
    x = 4 * torch.randn(rows, 180, generator=generator)
    x[:, :2] = torch.tensor([-100.0, 100.0])
    torch.testing.assert_close(function(x).double(), expected(x.double()), atol=3e-5, rtol=1e-6)


def test_half_precision_goes_in_and_out(generator):
    x = torch.randn(20, 180, generator=generator).bfloat16()
    assert gated(x).dtype == torch.bfloat16
    assert turned(x.view(-1, 5, 1, 36), FACTORS).dtype == torch.float32
    torch.testing.assert_close(gated(x).float(), FUNCTIONS["gated"][1](x.float()), atol=0.02, rtol=0.02)
