import numpy as np
import pytest

from smalto.data.order import epoch_order, sample_rng, sample_uniform


def test_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(0, 0, 100)) == list(range(100))
    assert np.array_equal(epoch_order(3, 5, 100), epoch_order(3, 5, 100))
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_sample_rng_depends_on_each_argument():
    draws = {sample_rng(*key).random() for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(draws) == 4
    assert sample_rng(1, 2, 3).random() == sample_rng(1, 2, 3).random()


def test_sample_uniform_does_not_depend_on_the_batch():
    indices = np.arange(1000)
    values = sample_uniform(7, 2, indices, stream=0)
    assert np.array_equal(values[[5, 900]], sample_uniform(7, 2, np.array([5, 900]), stream=0))
    assert values.min() >= 0
    assert values.max() < 1


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"stream": 1}])
def test_sample_uniform_is_uniform_and_independent(other):
    n = 200_000
    base = {"seed": 0, "epoch": 0, "stream": 0}
    a = sample_uniform(indices=np.arange(n), **base)
    b = sample_uniform(indices=np.arange(n), **(base | other))
    # standard errors: mean 0.29/sqrt(n), correlation 1/sqrt(n); five of each
    assert abs(a.mean() - 0.5) < 5 * 0.29 / n**0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 5 / n**0.5
    counts = np.bincount((a * 10).astype(int), minlength=10)
    assert ((counts - n / 10) ** 2 / (n / 10)).sum() < 40  # chi-square, 9 degrees: p < 1e-5
