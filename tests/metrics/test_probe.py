import pytest
import torch

from smalto.metrics.probe import ClassMeans, ClassMoments, ClassProbe


def clusters(generator, n=300, classes=4, d=6):
    centre = torch.eye(classes, d) * 4
    label = torch.randint(classes, (n,), generator=generator)
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0, 50.0, 0.0])  # one loud useless feature, one dead
    return (centre[label] + torch.randn(n, d, generator=generator)) * scale, label


def fitted(pool, label, batch=64, classes=4):
    moments = ClassMoments(num_classes=classes, num_features=pool.shape[1])
    for p, y in zip(pool.split(batch), label.split(batch), strict=True):
        moments.update(p, y)
    return ClassMeans(**moments.compute())


def test_streaming_fit_equals_direct_formula(generator):
    pool, label = clusters(generator)
    means = fitted(pool, label, batch=7)
    direct = torch.stack([pool[label == c].mean(0) for c in range(4)])
    torch.testing.assert_close(means.mean, direct, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means.std, (pool - direct[label]).square().mean(0).sqrt(), atol=1e-5, rtol=1e-5)


def test_accuracy_total_and_per_class(generator):
    means = fitted(*clusters(generator))
    pool, label = clusters(generator)
    probe = ClassProbe(means=means)
    for p, y in zip(pool.split(50), label.split(50), strict=True):
        probe.update(p, y)
    result = probe.compute()
    hit = means.predict(pool) == label
    assert float(result["accuracy"]) == pytest.approx(float(hit.float().mean()))
    assert float(result["accuracy"]) > 0.95  # standardised: the loud feature does not drown the others
    assert float(result["per_class"][2]) == pytest.approx(float(hit[label == 2].float().mean()))


def test_wrong_labels_score_low_and_unseen_classes_never_win(generator):
    pool, label = clusters(generator)
    means = fitted(pool, label, classes=6)
    assert int(means.predict(pool).max()) < 4
    probe = ClassProbe(means=means)
    probe.update(pool, (label + 1) % 4)
    result = probe.compute()
    assert float(result["accuracy"]) < 0.05
    assert bool(result["per_class"][5].isnan())  # never asked for


def test_labels_outside_are_refused(generator):
    moments = ClassMoments(num_classes=2, num_features=3)
    with pytest.raises(ValueError, match="num_classes"):
        moments.update(torch.randn(2, 3, generator=generator), torch.tensor([0, 2]))
