import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from smalto.metrics.inception_score import InceptionScore


def inception_score(logits, batch=50, **kwargs):
    metric = InceptionScore(num_logits=logits.shape[1], **kwargs)
    for part in logits.split(batch):
        metric.update(part)
    found = metric.compute()
    return found["mean"], found["std"]


def test_inception_score_equals_torch_fidelity_unshuffled(generator):
    logits = torch.randn(1000, 20, generator=generator) * 3
    mean, std = inception_score(logits, split_size=250)
    expected = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert float(mean) == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert float(std) == pytest.approx(expected["inception_score_std"], rel=1e-10)
    again = inception_score(logits, batch=33, split_size=250)
    assert float(again[0]) == float(mean)


def test_inception_score_splits(generator):
    logits = torch.randn(120, 10, generator=generator) * 3
    alone = inception_score(logits)  # fewer than one split: one split of all
    assert float(alone[0]) == pytest.approx(float(inception_score(logits, split_size=120)[0]))
    assert float(alone[1]) == 0.0
    # 120 in splits of 50 are two of 60; ADM would average in a third of 20.
    two = inception_score(logits, split_size=50)
    halves = [inception_score(half)[0] for half in logits.split(60)]
    assert float(two[0]) == pytest.approx(float(sum(halves)) / 2, rel=1e-12)


def test_inception_score_range(generator):
    certain = torch.eye(10).repeat(20, 1) * 2000  # -inf-like log probabilities must not give NaN
    assert float(inception_score(certain)[0]) == pytest.approx(10.0)
    assert float(inception_score(torch.zeros(50, 10))[0]) == pytest.approx(1.0)
    state = torch.get_rng_state()
    inception_score(torch.randn(50, 10, generator=generator))
    assert torch.equal(state, torch.get_rng_state())


def adm_inception_score(logits, split_size):
    """ADM's rule, written out: consecutive chunks, the last one smaller, all of equal weight."""
    p = logits.double().softmax(1)
    scores = []
    for start in range(0, len(p), split_size):
        part = p[start : start + split_size]
        divergence = (part * (part.log() - part.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


@pytest.mark.parametrize("count", [40, 100, 101, 250])
def test_adm_remainder(generator, count):
    logits = torch.randn(count, 10, generator=generator) * 3
    found = inception_score(logits, split_size=50, remainder="adm")[0]
    assert float(found) == pytest.approx(adm_inception_score(logits, 50), rel=1e-12)
    same = inception_score(logits, split_size=50)[0]
    assert (float(same) == pytest.approx(float(found), rel=1e-12)) == (count in (40, 100, 250))


def test_one_image_too_many_costs_a_third_under_adms_rule(generator):
    logits = torch.randn(101, 10, generator=generator) * 6
    equal, adm = (float(inception_score(logits, split_size=50, remainder=r)[0]) for r in ("equal", "adm"))
    assert adm < 0.8 * equal  # (a + a + 1) / 3


def test_numbers_of_the_images_decide_their_order(generator):
    logits = torch.randn(120, 10, generator=generator) * 3
    expected = inception_score(logits, split_size=40)
    order = torch.randperm(120, generator=generator)
    metric = InceptionScore(num_logits=10, split_size=40)
    for part in order.split(17):
        metric.update(logits[part], part)
    assert float(metric.compute()["mean"]) == float(expected[0])
    unknown = InceptionScore(num_logits=10, split_size=40)
    unknown.update(logits[order])
    assert float(unknown.compute()["mean"]) != float(expected[0])


def test_sorted_samples_score_lower_and_are_noticed(generator):
    classes = torch.arange(10).repeat_interleave(30)
    logits = torch.randn(300, 10, generator=generator) + 8 * torch.eye(10)[classes]
    order = torch.randperm(300, generator=generator)
    found = []
    for images in (logits, logits[order]):
        metric = InceptionScore(num_logits=10, split_size=60)
        metric.update(images)
        found.append(metric.compute())
    assert float(found[0]["mean"]) < 0.4 * float(found[1]["mean"])
    assert float(found[0]["class_runs"]) > 0.8
    assert abs(float(found[1]["class_runs"])) < 0.1


@pytest.mark.parametrize("bad", [{"split_size": 0}, {"remainder": "drop"}])
def test_bad_rules_are_refused(bad):
    with pytest.raises(ValueError, match="must be"):
        InceptionScore(num_logits=4, **bad)
