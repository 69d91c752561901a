"""Why two people get two numbers from one set of images: the size of each difference, and what prevents the mistake.

Real photographs of garments, EfficientNet-lite0 features; the traps are those of the field (reference, labels,
rounding, resizing, crops, order, number of images, JPEG).
"""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image

from conftest import fashion
from smalto.data.transforms import center_crop, to_float, to_pixels, to_uint8
from smalto.metrics.distribution import FrechetDistance
from smalto.metrics.image import SSIM
from smalto.metrics.lite0 import Lite0Features
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics


@pytest.fixture(scope="module")
def garments():
    return fashion(0, 400)


def fid(lite0, real, fake):
    metric = FrechetDistance(num_features=lite0.num_features)
    for side, images in ((True, real), (False, fake)):
        metric.update(lite0(images).pool, real=side)
    return float(metric.compute())


def test_wrong_reference(lite0, garments):
    """Reconstructions against a training set instead of their originals: an rFID many times too large; refused."""
    image = garments[0]
    rebuilt = (image // 8) * 8
    right, wrong = fid(lite0, image[:200], rebuilt[:200]), fid(lite0, image[200:], rebuilt[:200])
    assert wrong > 2 * right
    training = GenerationMetrics(features=lite0)
    training.update_real(image[200:])
    with pytest.raises(ValueError, match="reconstructions with the very images they were made from"):
        GenerationMetrics(features=lite0, reference=training.finish_real(), kind="reconstruction")


def test_raw_instead_of_cropped_originals(lite0):
    """Validation images squeezed to a square instead of cropped: not the images that were encoded."""
    photo = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427
    parts = [photo.crop((x, y, x + 160, y + 100)) for x in range(0, 480, 16) for y in range(0, 320, 64)]
    cropped, squeezed = (
        torch.from_numpy(np.stack([np.asarray(f(part)) for part in parts])).permute(0, 3, 1, 2)
        for f in (lambda p: center_crop(p, 64), lambda p: p.resize((64, 64), Image.Resampling.BICUBIC))
    )
    assert fid(lite0, cropped, squeezed) > 50 * max(fid(lite0, cropped, cropped), 1e-6)


def test_unbalanced_labels(lite0, garments):
    """A generator that is perfect per class but drawn with random labels: fewer of some classes, a larger FID."""
    image, label = garments
    order = label.argsort(stable=True)
    per_class = torch.cat([order[label[order] == c][:15] for c in range(10)])
    skewed = torch.cat([order[label[order] == c][: 3 + 3 * c] for c in range(10)])[:150]
    real = fashion(400, 800)[0]
    assert fid(lite0, real, image[skewed]) > 1.02 * fid(lite0, real, image[per_class])


def test_rounding(lite0, garments):
    """``x 255`` cut off instead of rounded darkens by half a level; the authors' ``+ 128`` is rounding in effect."""
    image = garments[0][:200]
    noise = torch.rand(image.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    pictures = (to_float(image) + noise / 127.5).clamp(-1, 1)
    nearest, authors = to_uint8(pictures), to_uint8(pictures, "truncate")
    cut_off = ((pictures + 1) / 2 * 255).byte()
    assert (nearest != authors).float().mean() < 1e-3
    inside = (nearest > 1) & (nearest < 254)  # the black ground is clamped
    lost = (nearest.float() - cut_off.float())[inside].mean()
    assert float(lost) == pytest.approx(0.5, abs=0.05)
    assert fid(lite0, nearest, cut_off) > 100 * max(fid(lite0, nearest, authors), 1e-9)


def test_resizing_to_the_size_of_the_reference(lite0, garments):
    """384 to 256 px after rounding, or with antialiasing, is not what the authors do: bicubic, before rounding."""
    image = to_float(garments[0][:100])
    large = F.interpolate(image, size=(48, 48), mode="bicubic")
    theirs = to_pixels(large, size=32)
    late = to_pixels(to_float(to_uint8(large)), size=32)
    smooth = to_uint8(F.interpolate(large, size=(32, 32), mode="bicubic", antialias=True))
    assert (theirs != late).float().mean() > 0.02
    assert fid(lite0, theirs, smooth) > 2 * fid(lite0, theirs, late) > 10


def test_jpeg(lite0, garments):
    """Samples kept as JPEG of quality 90 are other samples; smalto writes PNG."""
    image = garments[0][:200]
    kept = []
    for pixels in image.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        kept.append(np.asarray(Image.open(buffer)))
    assert fid(lite0, image, torch.from_numpy(np.stack(kept)).permute(0, 3, 1, 2)) > 1.0


def test_number_of_images(lite0, garments):
    """FID falls with more images of the same kind: a number without its N says nothing."""
    real = fashion(400, 800)[0]
    few, many = fid(lite0, real, garments[0][:100]), fid(lite0, real, garments[0])
    assert few > 1.3 * many


def test_extractor(lite0, garments):
    """Another input size of the same network is another number; names differ, and references do not fit."""
    other = Lite0Features(size=96)
    left, right = garments[0][:100], garments[0][100:200]
    values = [fid(network, left, right) for network in (lite0, other)]
    assert abs(values[0] - values[1]) > 0.05 * values[0]
    suite = GenerationMetrics(features=lite0)
    suite.update_real(left)
    reference: Reference = suite.finish_real()
    with pytest.raises(ValueError, match="measured with features lite0_64, this run uses lite0_96"):
        GenerationMetrics(features=other, reference=reference)


def test_ssim_range(garments):
    """The paper's SSIM was computed with twice the range of its images, which raises it."""
    image = garments[0][:50]
    noise = 12 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    noisy = (image.float() + noise).clamp(0, 255).byte()
    values = []
    for data_range in (1.0, 2.0):
        metric = SSIM(data_range=data_range)
        metric.update(noisy, image)
        values.append(float(metric.compute()))
    assert values[1] > values[0] + 0.02


def test_order_of_the_samples(lite0, garments, caplog):
    """Sorted by class, the score over splits falls; smalto's own files are shuffled, and it warns of others."""
    image, label = garments
    scores = []
    for order in (torch.arange(400), label.argsort(stable=True)):
        suite = GenerationMetrics(features=lite0, rules=Rules(split_size=50, kid_subsets=0))
        suite.update_real(image[:50])
        suite.update_fake(image[order])
        scores.append(suite.compute().values["is_lite0_64"])
    assert scores[1] < 0.8 * scores[0]
    assert "look sorted by class" in caplog.text
