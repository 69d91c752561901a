import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_full

from smalto.metrics.manifold import PrecisionRecall, precision_recall


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_torch_fidelity(generator, k, dtype):
    real = torch.randn(300, 8, generator=generator, dtype=dtype) + 5
    fake = torch.randn(250, 8, generator=generator, dtype=dtype) * 0.8 + 5.3
    expected = calculate_precision_recall_full(fake, real, neighborhood=k)
    metric = PrecisionRecall(num_features=8, k=k, block_size=64)
    for side, features in ((True, real), (False, fake)):
        metric.update(features, real=side)
    found = metric.compute()
    assert [float(v) for v in found] == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected[0] < 1.0  # the comparison means something
    assert 0.05 < expected[1] < 1.0


def test_order_and_blocks_do_not_matter(generator):
    real, fake = torch.randn(90, 6, generator=generator), torch.randn(80, 6, generator=generator)
    expected = precision_recall(real, fake)
    metric = PrecisionRecall(num_features=6, block_size=7)
    for part in fake.flip(0).split(13):
        metric.update(part, real=False)
    for part in real.flip(0).split(17):
        metric.update(part, real=True)
    assert metric.compute() == expected


def test_extremes(generator):
    real = torch.randn(60, 5, generator=generator)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    collapsed = real[:1] + 1e-4 * torch.randn(60, 5, generator=generator)
    precision, recall = precision_recall(real, collapsed)
    assert precision == 1.0
    assert recall < 0.05


def test_reset_fake_keeps_the_real_side(generator):
    real, fake = torch.randn(40, 5, generator=generator), torch.randn(40, 5, generator=generator)
    metric = PrecisionRecall(num_features=5)
    metric.update(real, real=True)
    metric.update(fake + 9, real=False)
    metric.compute()
    metric.reset_fake()
    metric.update(fake, real=False)
    assert metric.compute() == precision_recall(real, fake)
    given = PrecisionRecall(num_features=5)
    given.set_real(real)
    given.update(fake, real=False)
    assert given.compute() == precision_recall(real, fake)
    with pytest.raises(ValueError, match="set from a reference"):
        given.update(real, real=True)


def test_too_few(generator):
    points = torch.randn(3, 5, generator=generator)
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(points, points)


def half_reference(real, fake, k=3):
    """ADM's float16 distances by numpy, whole matrices."""

    def distances(a, b):
        a, b = a.numpy().astype(np.float16), b.numpy().astype(np.float16)
        product = (a.astype(np.float32) @ b.astype(np.float32).T).astype(np.float16)
        norms = [(x * x).astype(np.float32).sum(1).astype(np.float16) for x in (a, b)]
        return ((norms[0][:, None] - 2 * product) + norms[1]).astype(np.float32)

    radii = [np.partition(distances(x, x), k, axis=1)[:, k] for x in (real, fake)]
    cross = distances(real, fake)
    return (cross <= radii[0][:, None]).any(0).mean(), (cross <= radii[1]).any(1).mean()


def test_half_precision_as_in_adm(generator):
    real = torch.randn(600, 64, generator=generator).relu() + 0.5
    fake = torch.randn(500, 64, generator=generator).relu() * 0.95 + 0.5
    found = [float(v) for v in precision_recall(real, fake, distance_dtype="fp16", block_size=130)]
    assert found == pytest.approx(half_reference(real, fake), abs=1e-7)
    exact = [float(v) for v in precision_recall(real, fake)]
    assert found != exact
    assert found == pytest.approx(exact, abs=0.05)


def test_half_precision_falls_back_where_it_overflows(generator):
    real, fake = (400 * torch.randn(40, 64, generator=generator) for _ in range(2))  # squared distances beyond 65,504
    assert precision_recall(real, fake, distance_dtype="fp16") == precision_recall(real, fake)
    with pytest.raises(ValueError, match="fp32, or fp16"):
        PrecisionRecall(num_features=4, distance_dtype="bf16")
