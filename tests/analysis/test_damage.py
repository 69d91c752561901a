import numpy as np
import pytest
import torch
from torch import Tensor

from smalto.analysis.damage import blur, drop_classes, duplicate, jpeg, noise
from smalto.data.source_idx import FashionMnist

DAMAGES = {
    "blur": (lambda image, level: blur(image, sigma=level), 1.5),
    "noise": (lambda image, level: noise(image, std=level, generator=torch.Generator().manual_seed(1)), 20),
    "jpeg": (lambda image, level: jpeg(image, loss=level), 80),
    "duplicate": (lambda image, level: duplicate(image, share=level), 0.5),
    "drop_classes": (
        lambda image, level: drop_classes(
            image.repeat(2, 1, 1, 1), torch.arange(2 * len(image)) % 4, num_dropped=level, num_images=len(image)
        ),
        2,
    ),
}
parametrize = pytest.mark.parametrize(("damage", "level"), DAMAGES.values(), ids=DAMAGES)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """Twelve pictures, coloured by three different garments in their channels."""
    grey = torch.tensor(FashionMnist().load()[0][2][:36])
    return grey.view(12, 3, 28, 28)


@parametrize
def test_level_zero_changes_nothing(damage, level, image):
    assert torch.equal(damage(image, 0), image)


@parametrize
def test_a_damage_is_a_pure_function_that_keeps_number_and_type(damage, level, image):
    before, state = image.clone(), torch.get_rng_state()
    damaged = damage(image, level)
    assert (damaged.dtype, damaged.shape) == (torch.uint8, image.shape)
    assert not torch.equal(damaged, image)
    assert torch.equal(damage(image, level), damaged)
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_blur_keeps_the_mean_and_takes_contrast(image):
    flat = torch.full((1, 3, 28, 28), 77, dtype=torch.uint8)
    assert torch.equal(blur(flat, sigma=2), flat)
    spread = [blur(image, sigma=sigma).double().std() for sigma in (0, 1, 2)]
    assert spread[0] > spread[1] > spread[2]
    # Garments that touch the edge are reflected there, which moves the mean by a few grey levels.
    assert blur(image, sigma=1).double().mean() == pytest.approx(image.double().mean(), abs=2)


def test_blur_of_a_point_is_the_gaussian():
    point = torch.zeros(1, 3, 25, 25, dtype=torch.uint8)
    point[..., 12, 12] = 255
    x = np.arange(-12, 13)
    expected = np.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 2.0**2))
    expected *= 255 / expected.sum()
    # Rounding is half a level; the kernel ends at 3 sigma, where 1 % of the centre is left.
    np.testing.assert_allclose(blur(point, sigma=2)[0, 0], expected, atol=0.6)


def test_noise_has_the_std_asked_for():
    grey = torch.full((8, 3, 32, 32), 128, dtype=torch.uint8)
    added = noise(grey, std=10, generator=torch.Generator().manual_seed(0)).double() - 128
    # 24,576 values: the std of the mean is 0.064, of the std 0.045; rounding adds 1/12 to the variance, 0.004.
    assert added.mean() == pytest.approx(0, abs=0.25)
    assert added.std() == pytest.approx(10, abs=0.2)
    assert added[:, 0].flatten() @ added[:, 1].flatten() / added[:, 0].numel() < 5  # channels are independent


def test_jpeg_loses_more_at_lower_quality(image):
    errors = [(jpeg(image, loss=loss).double() - image.double()).square().mean() for loss in (0, 5, 50, 95)]
    assert errors == sorted(errors)
    assert errors[1] > 0


def test_classes_are_dropped_from_the_end_and_nothing_is_repeated():
    label = torch.tensor([3, 0, 1, 2, 0, 3, 1, 2, 0, 1])
    image = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 4, 4)
    assert drop_classes(image, label, num_dropped=2, num_images=4)[:, 0, 0, 0].tolist() == [1, 2, 4, 6]
    with pytest.raises(ValueError, match="hold 3 images, 4 are needed"):
        drop_classes(image, label, num_dropped=3, num_images=4)


def test_copies_are_as_many_as_asked_for_and_even():
    image = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(-1, 3, 4, 4)
    values = duplicate(image, share=0.7)[:, 0, 0, 0]
    assert torch.bincount(values.int()).tolist() == [4, 3, 3]
    assert set(duplicate(image, share=0.99)[:, 0, 0, 0].tolist()) == {0}


@pytest.mark.parametrize(
    ("name", "level", "said"),
    [
        ("blur", -1, "3 sigma"),
        ("blur", 10, "28 px"),
        ("noise", -1, "grey levels"),
        ("jpeg", 100, "0 to 99"),
        ("duplicate", 1, r"\[0, 1\)"),
        ("drop_classes", 4, "drop 0 to 3"),
    ],
)
def test_impossible_levels_are_refused(name, level, said, image):
    with pytest.raises(ValueError, match=said):
        DAMAGES[name][0](image, level)
