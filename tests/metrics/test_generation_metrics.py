import logging
import math
import re

import pytest
import torch
from tiny_features import TinyFeatures
from torch import nn

from smalto.metrics.distribution import frechet_distance
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics

KEYS = {"fid", "sfid", "is", "kid", "precision", "recall", "class_accuracy"}
RULES = Rules(kid_subsets=3, kid_subset_size=50)


def suite(**settings):
    return GenerationMetrics(features=TinyFeatures(), num_classes=10, **{"rules": RULES} | settings)


def filled(metrics, real, fake, batch=64):
    for image, label in zip(*(t.split(batch) for t in real), strict=True):
        metrics.update_real(image, label)
    for image, label in zip(*(t.split(batch) for t in fake), strict=True):
        metrics.update_fake(image, label)
    return metrics


def plain(values):
    return {key.removesuffix("_tiny"): value for key, value in values.items()}


def test_keys_are_named_after_the_extractor_and_fit_mlflow(real, held_out):
    values = filled(suite(), real, held_out).compute().values
    assert set(plain(values)) == KEYS
    assert all(key.endswith("_tiny") and re.fullmatch(r"[a-zA-Z0-9_/. -]+", key) for key in values)
    assert all(isinstance(value, float) and math.isfinite(value) for value in values.values())


def test_worse_images_score_worse(lite0, real, held_out):
    """Real images of the same kind, the same with noise, blurred, and one image over and over."""
    image, label = held_out
    noise = 40 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    variants = {
        "real": image,
        "blurred": nn.functional.avg_pool2d(image.float(), 5, stride=1, padding=2).to(torch.uint8),
        "noisy": (image + noise).clamp(0, 255).to(torch.uint8),
        "collapsed": image[:1].repeat(len(image), 1, 1, 1),
    }
    metrics = filled(GenerationMetrics(features=lite0, num_classes=10), real, held_out)
    scores = {}
    for name, images in variants.items():
        metrics.reset_fake()
        metrics.update_fake(images, label)
        scores[name] = {key.removesuffix("_lite0_64"): value for key, value in metrics.compute().values.items()}
    for name in ("blurred", "noisy", "collapsed"):
        assert scores[name]["fid"] > 1.3 * scores["real"]["fid"]
        assert scores[name]["recall"] < scores["real"]["recall"]
        assert scores[name]["class_accuracy"] < scores["real"]["class_accuracy"]
    assert scores["real"]["class_accuracy"] > 0.6
    assert scores["collapsed"]["is"] == pytest.approx(1.0, abs=1e-4)


def test_order_and_batch_size_do_not_matter(real, held_out):
    one = filled(suite(), real, held_out, batch=200).compute().values
    turned = [tuple(t.flip(0) for t in side) for side in (real, held_out)]
    two = filled(suite(), *turned, batch=17).compute().values
    for values in (one, two):
        values.pop("kid_tiny")  # its subsets are drawn by position
    assert one == pytest.approx(two, rel=1e-9)


def test_fake_before_real_is_the_same(real, held_out):
    first = suite()
    for image, label in zip(*(t.split(64) for t in held_out), strict=True):
        first.update_fake(image, label)
    first.update_real(*real)
    second = filled(suite(), real, held_out)
    assert first.compute().values == pytest.approx(second.compute().values, rel=1e-9)


def test_cached_reference_gives_the_same_numbers(real, held_out, tmp_path):
    measured = filled(suite(), real, held_out)
    measured.finish_real(images="t10k").save(tmp_path / "r.npz")
    reference = Reference.load(tmp_path / "r.npz", extractor="tiny", kind="generation")
    cached = suite(reference=reference)
    cached.update_fake(*held_out)
    assert cached.compute().values == pytest.approx(measured.compute().values, rel=1e-9)
    assert cached.reference.images == "t10k"
    with pytest.raises(ValueError, match="real side is complete"):
        cached.update_real(*real)


def test_wrong_reference_is_refused(real, lite0):
    metrics = suite()
    metrics.update_real(*real)
    reference = metrics.finish_real()
    with pytest.raises(ValueError, match="measured with features tiny, this run uses lite0_64"):
        GenerationMetrics(features=lite0, reference=reference)
    with pytest.raises(ValueError, match="is for generation"):
        GenerationMetrics(features=TinyFeatures(), reference=reference, kind="reconstruction")
    with pytest.raises(ValueError, match="10 classes, num_classes is 5"):
        GenerationMetrics(features=TinyFeatures(), reference=reference, num_classes=5)


def test_reset_fake_starts_over(real, held_out):
    metrics = filled(suite(), real, held_out)
    before = metrics.compute().values
    metrics.update_fake(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), torch.zeros(50, dtype=torch.int64))
    assert metrics.compute().values != before
    metrics.reset_fake()
    metrics.update_fake(*held_out)
    assert metrics.compute().values == pytest.approx(before, rel=1e-9)
    assert len(metrics.per_class_accuracy) == 10


def test_what_cannot_be_computed_is_absent_with_a_reason(real, held_out, caplog):
    caplog.set_level(logging.INFO)
    empty = suite()
    empty.update_real(*real)
    assert empty.compute().values == {}
    missing = empty.compute().missing
    assert {name.removesuffix("_tiny") for name in missing} == KEYS
    assert all("no " + name.removesuffix("_tiny") in caplog.text for name in missing)
    assert "got 200 real and 0 generated" in missing["fid_tiny"]

    few = suite()
    few.update_real(*real)
    few.update_fake(held_out[0][:3])
    assert set(plain(few.compute().values)) == {
        "fid",
        "sfid",
        "is",
    }  # 3 have no third neighbour, no labels

    no_real = GenerationMetrics(features=TinyFeatures())
    no_real.update_fake(*held_out)
    assert set(plain(no_real.compute().values)) == {"is"}

    only_one = suite()
    with pytest.raises(ValueError, match="at least 2"):
        only_one.finish_real()


def test_limits_and_kinds(real, held_out):
    limited = filled(GenerationMetrics(features=TinyFeatures(), rules=Rules(max_pool=50)), real, held_out)
    assert limited.finish_real().pool.shape == (50, 48)
    without = filled(GenerationMetrics(features=TinyFeatures(), rules=Rules(max_pool=0)), real, held_out)
    assert set(plain(without.compute().values)) == {"fid", "sfid", "is"}
    reconstruction = filled(GenerationMetrics(features=TinyFeatures(), kind="reconstruction"), real, real)
    values = reconstruction.compute().values
    assert set(values) == {"rfid_tiny", "rsfid_tiny"}
    assert values["rfid_tiny"] < 1e-9
    assert float(frechet_distance(*[reconstruction.reference.gaussian] * 2)) < 1e-9


def test_global_generator_is_untouched(real, held_out):
    state = torch.get_rng_state()
    filled(suite(), real, held_out).compute()
    assert torch.equal(state, torch.get_rng_state())


def test_works_in_and_out_of_inference_mode(real, held_out):
    """Lightning validates in inference mode and ends a fit outside of it; one object serves both."""
    expected = filled(suite(), real, held_out).compute().values
    with torch.inference_mode():
        image, label = real[0].clone(), real[1].clone()  # inference tensors
        metrics = suite().to("cpu")
        metrics.update_real(image, label)
        metrics.update_fake(image, label)
        metrics.compute()
        metrics.reset_fake()
    metrics.update_fake(*held_out)
    assert metrics.compute().values == pytest.approx(expected, rel=1e-9)
    metrics.reset_fake()
    with torch.inference_mode():
        metrics.update_fake(held_out[0].clone(), held_out[1].clone())
        assert metrics.compute().values == pytest.approx(expected, rel=1e-9)
