import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from smalto.metrics.kernel import kernel_distance


def test_equals_torch_fidelity_to_the_last_digit(generator):
    real = torch.randn(200, 16, generator=generator, dtype=torch.float64).relu()
    fake = torch.randn(180, 16, generator=generator, dtype=torch.float64).relu() * 1.1
    expected = kid_features_to_metric(fake, real, kid_subsets=7, kid_subset_size=50, verbose=False)
    mean, std = kernel_distance(real, fake, num_subsets=7, subset_size=50)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-12)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-12)


def test_zero_for_equal_distributions_and_grows_with_the_shift(generator):
    state = torch.get_rng_state()
    real, same = (torch.randn(400, 8, generator=generator) for _ in range(2))
    near, std = kernel_distance(real, same, num_subsets=20, subset_size=200)
    assert abs(near) < 3 * std
    shifted = [kernel_distance(real, same + shift, num_subsets=5, subset_size=200)[0] for shift in (0.5, 1.0)]
    assert near < shifted[0] < shifted[1]
    assert torch.equal(state, torch.get_rng_state())


def test_too_few_images(generator):
    with pytest.raises(ValueError, match="got 30 real and 60 generated"):
        kernel_distance(torch.zeros(30, 4), torch.zeros(60, 4), subset_size=50)
