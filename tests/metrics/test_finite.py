"""NaN and infinity become no score: whatever metric, one bad row among many, on either side."""

import math

import pytest
import torch
from tiny_features import TinyFeatures

from smalto.metrics.distribution import FrechetDistance, Gaussian, frechet_distance
from smalto.metrics.features import Features
from smalto.metrics.image import LPIPS
from smalto.metrics.inception_score import InceptionScore
from smalto.metrics.kernel import kernel_distance
from smalto.metrics.likelihood import CodeLikelihood
from smalto.metrics.manifold import PrecisionRecall, precision_recall
from smalto.metrics.probe import ClassMeans, ClassProbe
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics

BAD = [math.nan, math.inf, -math.inf]


def features(generator: torch.Generator, count: int = 200) -> torch.Tensor:
    return torch.rand(count, 6, generator=generator)


def spoiled(x: torch.Tensor, value: float) -> torch.Tensor:
    x = x.clone()
    x[7, ..., 2] = value
    return x


def gaussian(x: torch.Tensor) -> Gaussian:
    return Gaussian(mean=x.double().mean(0), cov=x.double().T.cov(), n=len(x))


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("side", [0, 1])
def test_features(generator, value, side):
    sides = [features(generator), features(generator)]
    sides[side] = spoiled(sides[side], value)
    assert math.isnan(frechet_distance(*(gaussian(x) for x in sides)))
    assert all(math.isnan(x) for x in precision_recall(*sides))
    assert all(math.isnan(x) for x in precision_recall(*sides, distance_dtype="fp16"))
    # The subsets draw 10 of 200 rows: most never see the bad one.
    assert all(math.isnan(x) for x in kernel_distance(*sides, num_subsets=2, subset_size=10))


def test_features_whose_squares_overflow_are_no_distances(generator):
    real = features(generator)
    fake = real.clone()
    fake[3] = 1e19
    assert all(math.isnan(x) for x in precision_recall(real, fake))
    fake[3] = 1e18  # far away, but a number
    precision, recall = precision_recall(real, fake)
    assert 0.99 < precision < 1
    assert recall > 0.99


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("remainder", ["equal", "adm"])
def test_one_bad_row_of_logits(generator, value, remainder):
    logits = 3 * torch.randn(200, 6, generator=generator)
    metric = InceptionScore(num_logits=6, split_size=50, remainder=remainder)
    metric.update(logits)
    good = metric.compute()
    assert good["mean"] > 1.5
    metric.reset()
    metric.update(spoiled(logits, value))
    assert math.isnan(metric.compute()["mean"])


def test_a_class_without_probability_is_a_number(generator):
    logits = 3 * torch.randn(200, 6, generator=generator)
    metric = InceptionScore(num_logits=6)
    logits[:100, 3] = -math.inf
    logits[:, 5] = -math.inf
    metric.update(logits)
    assert 1 < metric.compute()["mean"] <= 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_likelihood(generator, value):
    codes = torch.randint(6, (20, 4), generator=generator)
    logits = torch.randn(20, 4, 6, generator=generator)
    metric = CodeLikelihood()
    metric.update(spoiled(logits, value), codes)
    metric.update(logits, codes)
    assert metric.scores().values == {}
    assert set(metric.scores().missing) == {"loss", "accuracy", "bits_per_image"}


@pytest.mark.parametrize("value", BAD)
def test_class_probe(generator, value):
    pool, label = features(generator), torch.arange(200) % 3
    means = torch.stack([pool[label == k].mean(0) for k in range(3)])
    good = ClassMeans(mean=means, std=torch.ones(6), count=torch.full((3,), 70))
    bad = ClassMeans(mean=torch.where(torch.arange(6) == 2, value, means), std=good.std, count=good.count)
    for given, rows in ((good, spoiled(pool, value)), (bad, pool)):
        probe = ClassProbe(means=given)
        probe.update(rows, label)
        probe.update(pool, label)
        result = probe.compute()
        assert math.isnan(result["accuracy"])
        assert result["per_class"].isnan().all()
    probe = ClassProbe(means=good)
    probe.update(pool, label)
    assert 0 <= probe.compute()["accuracy"] <= 1


def test_perceptual_distance():
    metric = LPIPS(network=lambda a, b: torch.tensor([0.1, math.nan]))
    metric.update(*torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("value", BAD)
def test_a_reference_is_refused_by_name(generator, value):
    bad = spoiled(features(generator), value)
    with pytest.raises(ValueError, match=r"statistics of the real images hold \d+ numbers that are not finite"):
        FrechetDistance(num_features=6).set_real(gaussian(bad))
    with pytest.raises(ValueError, match="features of the real images hold 1 numbers"):
        PrecisionRecall(num_features=6).set_real(bad)


@pytest.mark.parametrize("value", BAD)
def test_all_of_them_are_missing_with_the_cause(generator, real, value):
    rules = Rules(split_size=20, kid_subsets=2, kid_subset_size=10)
    suite = GenerationMetrics(features=TinyFeatures(), num_classes=10, rules=rules)
    suite.update_real(*real)
    found = suite.features(real[0][:100])
    label = real[1][:100]
    bad = Features(pool=spoiled(found.pool, value), spatial=spoiled(found.spatial, value), logits=found.logits.clone())
    bad.logits[7] = value if value != -math.inf else math.nan
    suite.update_fake_features(bad, label)
    scores = suite.compute()
    assert scores.values == {}
    assert set(scores.missing) == {
        f"{name}_tiny" for name in ("fid", "sfid", "is", "kid", "precision", "recall", "class_accuracy")
    }
    assert all("of generated images are not finite" in reason for reason in scores.missing.values())
    suite.reset_fake()
    suite.update_fake_features(found, label)
    assert len(suite.compute().values) == 7, "bad images of one round must not spoil the next"
