import pytest
import torch

from smalto.nn.regularize import DropPath


@pytest.mark.parametrize(("drop_prob", "training"), [(0.5, False), (0.0, True)])
def test_identity_when_off(drop_prob, training, generator):
    x = torch.randn(4, 3, generator=generator)
    assert DropPath(drop_prob).train(training)(x) is x


def test_drops_whole_samples_and_rescales_the_rest():
    x = torch.ones(20_000, 2, 3)
    out = DropPath(0.3).train()(x).flatten(1)
    assert torch.equal(out.amin(1), out.amax(1))
    # 1 / 0.7 is not a float32: one rounding.
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.7, rel=1e-6)]
    # Binomial with standard deviation sqrt(0.3 * 0.7 / 20000) = 0.0032; five of them.
    assert abs(float((out[:, 0] == 0).float().mean()) - 0.3) < 0.017


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0])
def test_refuses_what_is_no_probability(drop_prob):
    with pytest.raises(ValueError, match=f"drop_path is {drop_prob}"):
        DropPath(drop_prob)
