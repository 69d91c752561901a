import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import TenCrop

from smalto.data.transforms import (
    TEN_CROPS,
    center_crop,
    decode_image,
    named_crops,
    pad_to,
    random_crop,
    ten_crops,
    to_float,
    to_rgb,
    to_uint8,
)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_bytes_survive_the_way_to_floats_and_back(rounding):
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats, rounding), pixels)


def test_to_uint8_clamps_and_rounds_halves_up():
    # 127.5 x + 127.5 is exactly 0.5, 1.5 and 2.5 here: away from zero, not to even
    halves = (torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64) - 127.5) / 127.5
    assert to_uint8(torch.tensor([-9.0, -1.001, 1.001, 9.0])).tolist() == [0, 0, 255, 255]
    reference = torch.floor(halves * 127.5 + 127.5 + 0.5 + 1e-9)
    assert to_uint8(halves).tolist() == reference.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="nearest or truncate"):
        to_uint8(halves, "up")


def test_to_uint8_does_not_touch_its_input():
    image = torch.full((2, 3), 0.3)
    to_uint8(image)
    to_uint8(image, "truncate")
    assert torch.equal(image, torch.full((2, 3), 0.3))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 40), (95, 33), (200, 64), (9, 12)])
def test_center_crop_follows_adm(height, width):
    image, size = noise(height, width), 16
    reference = image  # guided_diffusion/image_datasets.py, center_crop_arr
    while min(*reference.size) >= 2 * size:
        reference = reference.resize(tuple(x // 2 for x in reference.size), resample=Image.BOX)
    scale = size / min(*reference.size)
    reference = reference.resize(tuple(round(x * scale) for x in reference.size), resample=Image.BICUBIC)
    arr = np.array(reference)
    y, x = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
    assert np.array_equal(np.asarray(center_crop(image, size)), arr[y : y + size, x : x + size])


def test_center_crop_leaves_a_fitting_image_alone():
    image = noise(32, 32)
    assert np.array_equal(np.asarray(center_crop(image, 32)), np.asarray(image))


def test_random_crop_is_a_function_of_its_generator_and_varies():
    image = noise(40, 60)
    crops = [np.asarray(random_crop(image, 16, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert crops[0].shape == (16, 16, 3)
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


def test_random_crop_draws_every_scale_of_the_official_range():
    # a ramp over the short side: the spread inside the crop tells the scale (256..320 for 256, 20..25 for 20)
    ramp = np.repeat(np.linspace(0, 250, 400)[None, :, None], 400, 0).repeat(3, 2).astype(np.uint8)
    image = Image.fromarray(ramp)
    spreads = []
    for seed in range(200):
        crop = np.asarray(random_crop(image, 20, np.random.default_rng(seed))).astype(int)
        spreads.append((crop[0, -1, 0] - crop[0, 0, 0]) / 250 * 20 / 19)
    assert 0.78 < min(spreads) < 0.83
    assert 0.97 < max(spreads) < 1.02


@pytest.mark.parametrize(("size", "crop_range"), [(16, 1.1), (20, 1.05), (20, 1.3)])
def test_ten_crops_equal_torchvisions(size, crop_range):
    image = noise(50, 70)
    reference = TenCrop(size)(center_crop(image, int(size * crop_range)))
    crops = ten_crops(image, size, crop_range)
    assert crops.shape == (10, size, size, 3)
    assert len(TEN_CROPS) == len(set(TEN_CROPS)) == 10
    for crop, expected in zip(crops, reference, strict=True):
        assert np.array_equal(crop, np.asarray(expected))


def test_published_crop_sizes():
    # 256 -> 281 and 268, 384 -> 422 and 403 in the official extraction
    assert [int(size * r) for size in (256, 384) for r in (1.1, 1.05)] == [281, 268, 422, 403]


def test_center_and_its_mirror_without_margin():
    image = noise(30, 20)
    crops = named_crops(image, 16, 1.0, ["center", "center_flip"])
    assert np.array_equal(crops[0], np.asarray(center_crop(image, 16)))
    assert np.array_equal(crops[1], crops[0][:, ::-1])


def test_pad_centres_on_black():
    padded = np.asarray(pad_to(noise(28, 28), 32))
    assert np.array_equal(padded[2:30, 2:30], np.asarray(noise(28, 28)))
    assert padded.sum() == np.asarray(noise(28, 28)).sum()
    with pytest.raises(ValueError, match="40x28"):
        pad_to(noise(28, 40), 32)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (200, 0, 0, 255)), (200, 0, 0)),
        (Image.new("LA", (2, 2), (10, 255)), (10, 10, 10)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.fromarray(np.full((2, 2), 65535, np.uint16)), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 257 * 100, np.uint16)), (100, 100, 100)),
        (Image.fromarray(np.full((2, 2), 257 * 7, np.int32)), (7, 7, 7)),
        (Image.new("P", (2, 2)), (0, 0, 0)),
    ],
    ids=["grey", "binary", "clear", "opaque", "grey-alpha", "cmyk", "white16", "grey16", "int32", "palette"],
)
def test_every_mode_becomes_rgb(image, expected):
    converted = to_rgb(image)
    assert converted.mode == "RGB"
    assert converted.getpixel((0, 0)) == expected


def test_transparent_palette_colour_becomes_white():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert decode_image(encoded(image, format="PNG", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(image, format="PNG", transparency=0)).getpixel((0, 0)) == (9, 9, 9)


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(image, format="JPEG", exif=exif)).size == (2, 4)


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="float pixels"):
        to_rgb(Image.fromarray(np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_damaged_files_give_one_kind_of_error(image_format):
    data = encoded(noise(40, 40), format=image_format)
    for damaged in (b"", b"hello", data[: len(data) // 2], data[:30]):
        with pytest.raises(ValueError, match="not a readable picture"):
            decode_image(damaged)
    assert decode_image(data).size == (40, 40)
