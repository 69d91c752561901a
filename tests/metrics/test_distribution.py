import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from smalto.metrics.distribution import FrechetDistance, Gaussian, frechet_distance


def random_features(generator, n, d, shift=0.0):
    mix = torch.randn(d, d, generator=generator) / d**0.5
    return torch.randn(n, d, generator=generator) @ mix + shift


def fid(real, fake, batch=64):
    metric = FrechetDistance(num_features=real.shape[1])
    for part in real.split(batch):
        metric.update(part, real=True)
    for part in fake.split(batch):
        metric.update(part, real=False)
    return float(metric.compute())


def torch_fidelity_fid(real, fake):
    statistics = [fid_features_to_statistics(x.double()) for x in (real, fake)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


def test_equals_torch_fidelity_torchmetrics_and_scipy(generator):
    real, fake = random_features(generator, 500, 32), random_features(generator, 400, 32, 0.1)
    found = fid(real, fake)
    assert found == pytest.approx(torch_fidelity_fid(real, fake), rel=1e-10)
    metric = FrechetInceptionDistance(feature=IdentityWithSize(32))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    assert found == pytest.approx(float(metric.compute()), rel=1e-10)
    (m1, s1), (m2, s2) = [(np.mean(x, 0), np.cov(x.T)) for x in (real.double().numpy(), fake.double().numpy())]
    root = scipy.linalg.sqrtm(s1 @ s2).real
    assert found == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root), rel=1e-10)


class IdentityWithSize(torch.nn.Identity):
    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features


def exact_singular_fid(real, fake):
    """From singular values of the product of centred features: no covariance, no root of a rounding error."""
    real, fake = real.double(), fake.double()
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real, fake)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    traces = sum(x.square().sum() for x in centred)
    return float((real.mean(0) - fake.mean(0)).square().sum() + traces - 2 * cross)


@pytest.mark.parametrize(("n", "m"), [(40, 60), (60, 40), (300, 50), (50, 300)])
def test_fewer_images_than_features(generator, n, m):
    real, fake = random_features(generator, n, 128), random_features(generator, m, 128)
    # ReLU features: the mean is large against the spread, as in practice.
    real, fake = real.relu() + 1, fake.relu() + 1
    assert fid(real, fake) == pytest.approx(exact_singular_fid(real, fake), rel=1e-9)


@pytest.mark.parametrize("n", [30, 500])
def test_a_set_against_itself_is_zero(generator, n):
    real = random_features(generator, n, 64).relu() + 1
    scale = float(real.var(0).sum())
    assert fid(real, real) < 1e-9 * scale
    assert fid(real, real.flip(0), batch=7) < 1e-9 * scale


def test_injected_real_statistics(generator):
    real, fake = random_features(generator, 80, 32), random_features(generator, 90, 32, 0.2)
    measured = FrechetDistance(num_features=32)
    measured.update(real, real=True)
    injected = FrechetDistance(num_features=32)
    injected.set_real(measured.real())
    injected.update(fake, real=False)
    assert float(injected.compute()) == pytest.approx(fid(real, fake), rel=1e-12)
    with pytest.raises(ValueError, match="set from a reference"):
        injected.update(real, real=True)
    with pytest.raises(ValueError, match="32"):
        injected.set_real(Gaussian(mean=torch.zeros(8), cov=torch.eye(8), n=9))
    injected.reset()  # forgets the generated side only
    injected.update(real, real=False)
    assert float(injected.compute()) < 1e-9


def test_one_image_is_refused(generator):
    metric = FrechetDistance(num_features=4)
    metric.update(torch.randn(1, 4, generator=generator), real=True)
    with pytest.raises(ValueError, match="at least 2"):
        metric.compute()
    with pytest.raises(ValueError, match="same extractor"):
        frechet_distance(
            Gaussian(mean=torch.zeros(2), cov=torch.eye(2), n=3),
            Gaussian(mean=torch.zeros(3), cov=torch.eye(3), n=3),
        )


def test_full_rank_with_a_wide_spectrum(generator):
    """Eigenvalues from 1 to 1e-12, more images than features: the fast root must not pass its rounding errors on."""
    scales = torch.logspace(0, -6, 64, dtype=torch.float64)
    real, fake = (torch.randn(500, 64, generator=generator, dtype=torch.float64) * scales for _ in range(2))
    assert fid(real, fake) == pytest.approx(exact_singular_fid(real, fake), rel=1e-9)
    assert fid(real, real) < 1e-12


def test_features_that_never_fire(generator):
    real, fake = (torch.randn(300, 40, generator=generator).relu() for _ in range(2))
    real[:, :5] = fake[:, :5] = 0
    assert fid(real, fake) == pytest.approx(exact_singular_fid(real, fake), rel=1e-9)
    assert fid(torch.zeros(50, 8), torch.zeros(50, 8)) == 0.0
