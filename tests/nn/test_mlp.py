import pytest
import torch
import torch.nn.functional as F

from smalto.nn.mlp import SwiGLU, swiglu_hidden_size

# Widths of the authors' configurations.
HIDDEN = {768: 2048, 1024: 2816, 1280: 3584, 1536: 4096, 2048: 5632, 2560: 6912, 3200: 8704, 4096: 11008}


@pytest.mark.parametrize(("dim", "hidden"), HIDDEN.items())
def test_hidden_sizes_of_the_paper(dim, hidden):
    assert swiglu_hidden_size(dim) == hidden


@pytest.mark.parametrize("multiple_of", [1, 16, 256])
def test_hidden_size_is_the_next_multiple(multiple_of):
    for dim in range(1, 600, 7):
        hidden = swiglu_hidden_size(dim, multiple_of)
        assert hidden % multiple_of == 0
        assert hidden - multiple_of < 8 * dim / 3 < hidden + 1  # the rule cuts 8/3 dim to an integer first


def test_closed_form(generator):
    layer = SwiGLU(5, 5)
    for linear, factor in ((layer.gate, 1.0), (layer.up, 2.0), (layer.down, 3.0)):
        linear.weight.data = factor * torch.eye(5)
    x = torch.randn(4, 5, generator=generator)
    torch.testing.assert_close(layer(x), 3 * (F.silu(x) * 2 * x))


def test_has_no_biases():
    assert sorted(dict(SwiGLU(4, 8).named_parameters())) == ["down.weight", "gate.weight", "up.weight"]


def test_drops_out_in_training_only(generator):
    layer = SwiGLU(64, 64, dropout=0.5)
    x = torch.randn(8, 64, generator=generator)
    # 512 outputs, half of them dropped: 256 +- 5 standard deviations of 11.3.
    assert abs(int((layer.train()(x) == 0).sum()) - 256) < 57
    assert (layer.eval()(x) != 0).all()
