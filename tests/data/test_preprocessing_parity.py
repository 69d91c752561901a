"""Crops and pixels against the authors' preprocessing, transcribed from its description, byte by byte.

The sizes are those that go wrong: portrait, landscape, odd, smaller than the crop, exactly twice it, one pixel off;
and grey pictures, which arrive with one channel.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from smalto.data.transforms import center_crop, random_crop, ten_crops, to_float, to_pixels, to_rgb, to_uint8

SIZES = [(48, 48), (97, 131), (131, 97), (33, 200), (200, 33), (96, 96), (95, 97), (17, 23), (5, 9), (191, 193)]
SIZE = 48


def picture(height: int, width: int, *, grey: bool = False) -> Image.Image:
    rng = np.random.default_rng(height * 1000 + width)
    ramp = np.add.outer(np.arange(height), np.arange(width)) % 256  # something smooth and something rough
    if grey:
        return Image.fromarray(((ramp + rng.integers(0, 40, (height, width))) % 256).astype(np.uint8), "L")
    return Image.fromarray(((ramp[:, :, None] + rng.integers(0, 40, (height, width, 3))) % 256).astype(np.uint8))


def their_center_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM: halve by BOX while the short side is at least twice the size, BICUBIC to it, cut out the middle."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def their_random_crop(image: Image.Image, size: int, short: int, top: float, left: float) -> np.ndarray:
    """Short side to ``short`` by the same two filters, then a square at a share of the room there is."""
    while min(image.size) >= 2 * short:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    scale = short / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    y, x = (int(share * (room - size + 1)) for share, room in zip((top, left), pixels.shape[:2], strict=True))
    return pixels[y : y + size, x : x + size]


def their_ten_crops(image: Image.Image, size: int, crop_range: float) -> list[np.ndarray]:
    """Four corners and the centre of the outer square, then the same five of the mirrored square."""
    outer = int(size * crop_range)
    square = their_center_crop(image, outer)
    crops = []
    for pixels in (square, square[:, ::-1]):
        far = outer - size
        middle = round((outer - size) / 2.0)
        for top, left in ((0, 0), (0, far), (far, 0), (far, far), (middle, middle)):
            crops.append(pixels[top : top + size, left : left + size])
    return crops


class Chosen:
    """A generator that draws what it is told: a size, then shares of the room."""

    def __init__(self, short: int, top: float, left: float) -> None:
        self.draws = iter([short, left, top])

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        drawn = next(self.draws)
        value = drawn if isinstance(drawn, int) else low + int(drawn * (high - low))
        assert low <= value < high
        return value


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def image(request) -> Image.Image:
    return picture(*request.param)


def test_center_crop(image):
    assert np.array_equal(np.asarray(center_crop(image, SIZE)), their_center_crop(image, SIZE))


@pytest.mark.parametrize("short", [SIZE, SIZE + 1, math.ceil(SIZE / 0.8)])
@pytest.mark.parametrize(("top", "left"), [(0.0, 0.999), (0.5, 0.3)])
def test_random_crop(image, short, top, left):
    ours = random_crop(image, SIZE, Chosen(short, top, left))
    assert np.array_equal(np.asarray(ours), their_random_crop(image, SIZE, short, top, left))


@pytest.mark.parametrize("crop_range", [1.1, 1.05])
def test_ten_crops(image, crop_range):
    for ours, theirs in zip(ten_crops(image, SIZE, crop_range), their_ten_crops(image, SIZE, crop_range), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("size", [(131, 97), (33, 200), (17, 23)])
def test_grey_pictures(size):
    """The authors' loader converts to RGB first."""
    grey = picture(*size, grey=True)
    ours, theirs = to_rgb(grey), grey.convert("RGB")
    assert np.array_equal(np.asarray(center_crop(ours, SIZE)), their_center_crop(theirs, SIZE))
    for crop, expected in zip(ten_crops(ours, SIZE, 1.1), their_ten_crops(theirs, SIZE, 1.1), strict=True):
        assert np.array_equal(crop, expected)


def test_normalisation():
    """Theirs: bytes / 255, minus a half, over a half."""
    pixels = torch.arange(256, dtype=torch.uint8)
    theirs = (pixels.numpy().astype(np.float32) / 255 - 0.5) / 0.5
    # The same numbers in another order of operations: half a unit in the last place of 1.
    np.testing.assert_allclose(to_float(pixels).numpy(), theirs, atol=1.2e-7, rtol=0)


def test_pixels_rounded_and_cut_off():
    image = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    grey = 127.5 * image.double().numpy() + 127.5
    away_from_zero = np.clip(np.floor(grey + 0.5), 0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(image).numpy(), away_from_zero)
    cut_off = np.clip(np.float32(127.5) * image.numpy() + np.float32(128.0), 0, 255).astype(np.uint8)
    assert np.array_equal(to_uint8(image, "truncate").numpy(), cut_off)


def cubic(t: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75, as PyTorch has it."""
    t, a = np.abs(t), -0.75
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def bicubic_matrix(size: int, out: int) -> np.ndarray:
    """(out, size): four neighbours around each centre whatever the scale, the outermost pixels repeated."""
    matrix = np.zeros((out, size))
    for i in range(out):
        centre = (i + 0.5) * size / out - 0.5
        first = math.floor(centre) - 1
        for j in range(first, first + 4):
            matrix[i, min(max(j, 0), size - 1)] += cubic(np.array(centre - j))
    return matrix


@pytest.mark.parametrize(("size", "out"), [(48, 32), (64, 32), (47, 31), (32, 48)])
@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_resizing_before_rounding(size, out, rounding):
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    matrix = bicubic_matrix(size, out)
    resized = matrix @ image.double().numpy() @ matrix.T
    expected = np.clip(np.floor(127.5 * resized + (128.0 if rounding == "truncate" else 127.5 + 0.5)), 0, 255)
    ours = to_pixels(image, size=out, rounding=rounding).numpy()
    # Float32 there, float64 here: a value within 1e-4 of a step may fall on either side of it.
    off = ours.astype(int) != expected
    distance = np.abs(127.5 * resized + 128 - np.round(127.5 * resized + 128))
    assert not (off & (distance > 1e-4)).any()
    authors = F.interpolate(image, size=(out, out), mode="bicubic")
    cut_off = np.clip(np.float32(127.5) * authors.numpy() + np.float32(128.0), 0, 255).astype(np.uint8)
    if rounding == "truncate":
        assert np.array_equal(ours, cut_off)


def test_pixels_of_the_same_size_are_not_resized():
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(to_pixels(image, size=8), to_uint8(image))
    assert torch.equal(to_pixels(image), to_uint8(image))
