import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter

from smalto.metrics.image import PSNR, SSIM


def pairs(real, sigma, generator):
    image = real[0][:12]
    noise = sigma * torch.randn(image.shape, generator=generator)
    return image, (image + noise).round().clamp(0, 255).to(torch.uint8)


def value(metric, image, other, batch=5):
    for a, b in zip(image.split(batch), other.split(batch), strict=True):
        metric.update(a, b)
    return float(metric.compute())


def scikit_image_ssim(x, y, data_range):
    """structural_similarity(channel_axis=0) of scikit-image, defaults otherwise, written out with scipy."""
    x, y = x.numpy() / 255.0, y.numpy() / 255.0
    unbiased, crop = 49 / 48, (slice(3, -3), slice(3, -3))
    scores = []
    for a, b in zip(x, y, strict=True):
        mean = [uniform_filter(v, 7) for v in (a, b, a * a, b * b, a * b)]
        va, vb = unbiased * (mean[2] - mean[0] ** 2), unbiased * (mean[3] - mean[1] ** 2)
        cov = unbiased * (mean[4] - mean[0] * mean[1])
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        top = (2 * mean[0] * mean[1] + c1) * (2 * cov + c2)
        scores.append((top / ((mean[0] ** 2 + mean[1] ** 2 + c1) * (va + vb + c2)))[crop].mean())
    return float(np.mean(scores))


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_scikit_images(real, generator, data_range):
    image, other = pairs(real, 30, generator)
    expected = np.mean([scikit_image_ssim(a, b, data_range) for a, b in zip(image, other, strict=True)])
    assert value(SSIM(data_range=data_range), image, other) == pytest.approx(expected, rel=1e-9)


def test_psnr_is_the_mean_over_images(real, generator):
    image, other = pairs(real, 30, generator)
    mse = (image.double() - other.double()).square().mean(dim=(1, 2, 3))
    assert value(PSNR(), image, other) == pytest.approx(float((10 * torch.log10(255**2 / mse)).mean()), rel=1e-12)


@pytest.mark.parametrize("make", [PSNR, SSIM])
def test_worse_images_score_lower_and_batches_do_not_matter(real, generator, make):
    scores = [value(make(), *pairs(real, sigma, generator)) for sigma in (0, 5, 20, 80)]
    assert scores == sorted(scores, reverse=True)
    assert np.isfinite(scores).all()  # an exact copy included
    image, other = pairs(real, 20, generator)
    assert value(make(), image, other, 12) == pytest.approx(value(make(), image.flip(0), other.flip(0), 1))


def test_refusals(real):
    with pytest.raises(ValueError, match="uint8"):
        PSNR().update(real[0][:2].float(), real[0][:2].float())
    with pytest.raises(ValueError, match="7 x 7"):
        SSIM().update(real[0][:2, :, :6], real[0][:2, :, :6])
    with pytest.raises(ValueError, match="data_range"):
        SSIM(data_range=0)
