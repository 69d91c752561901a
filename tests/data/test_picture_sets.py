import numpy as np
import pytest
import torch
from PIL import Image

from smalto.data.encode import Recipe
from smalto.data.npz_images import read_npz_statistics
from smalto.data.picture_sets import open_pictures
from smalto.data.source_idx import FashionMnist
from smalto.data.transforms import center_crop
from smalto.prepare import prepare_images


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)


def planes(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_folder(tmp_path, pixels):
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    pictures = open_pictures(tmp_path)
    assert len(pictures) == 7
    assert torch.equal(pictures.read(range(7)), planes(pixels))
    assert torch.equal(pictures.read([4, 1]), planes(pixels[[4, 1]]))
    assert pictures.name(3) == "3"
    before = pictures.fingerprint()
    Image.fromarray(pixels[0]).save(tmp_path / "9.png")
    assert open_pictures(tmp_path).fingerprint() != before


def test_folder_of_several_sizes(tmp_path, pixels):
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    Image.fromarray(pixels[1][:10]).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"a\.png has 12x12 pixels, b\.png has 12x10; give image_size="):
        open_pictures(tmp_path).read(range(2))
    cropped = open_pictures(tmp_path, image_size=8).read(range(2))
    expected = np.stack([np.asarray(center_crop(Image.fromarray(x), 8)) for x in (pixels[0], pixels[1][:10])])
    assert torch.equal(cropped, planes(expected))


@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path, pixels, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "x.npz", arr_0=pixels, arr_1=np.arange(7) % 3)
    pictures = open_pictures(tmp_path / "x.npz")
    assert torch.equal(pictures.read(range(2, 7)), planes(pixels[2:]))
    assert pictures.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert pictures.num_classes == 3
    with pytest.raises(ValueError, match="images of 12 px, image_size is 8"):
        open_pictures(tmp_path / "x.npz", image_size=8)


def test_shards(tmp_path):
    prepare_images(
        FashionMnist(),
        out=tmp_path,
        recipe=Recipe("pad", 32, "png", 1),
        split="auto",
        val_fraction=0.2,
        limit=40,
        shuffle=True,
        seed=0,
        shard_size=16,
        workers=0,
        max_rejected=0,
        overwrite=False,
        description={},
        command="",
    )
    val, train = open_pictures(tmp_path), open_pictures(tmp_path, split="train")
    assert len(val) + len(train) == 40
    assert val.read(range(len(val))).shape == (len(val), 3, 32, 32)
    assert val.num_classes == 10
    assert len(train.labels) == len(train)
    small = open_pictures(tmp_path, image_size=16)
    assert small.read([0]).shape == (1, 3, 16, 16)
    assert small.settings["crop"] == "center" != val.settings["crop"]


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


def bad_inputs(tmp_path, pixels):
    """What a user may give, and what is said."""
    (tmp_path / "empty").mkdir()
    for name in ("deep", "broken"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "deep" / "a.png")
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    (tmp_path / "text.npz").write_text("no archive")
    nan = pixels.astype(np.float32)
    nan[2, 0, 0, 0] = np.nan
    yield tmp_path / "nowhere", "no folder"
    yield tmp_path / "nowhere.npz", "no file"
    yield tmp_path / "empty", "no images"
    yield tmp_path / "deep", "more than 8 bits"
    yield tmp_path / "broken", "a.png: "
    yield tmp_path / "text.npz", "no .npz file"
    yield saved(tmp_path / "other.npz", images=pixels), "arr_0 is missing, it holds images"
    yield saved(tmp_path / "planes.npz", arr_0=planes(pixels).numpy()), r"shape \(7, 3, 12, 12\)"
    yield saved(tmp_path / "grey.npz", arr_0=pixels[..., 0]), r"must be \(N, height, width, 3\)"
    yield saved(tmp_path / "none.npz", arr_0=pixels[:0]), r"shape \(0, 12, 12, 3\)"
    yield saved(tmp_path / "float.npz", arr_0=pixels / 255), "float64; images must be uint8"
    yield saved(tmp_path / "nan.npz", arr_0=nan), "float32 with NaN or infinite pixels"


def test_bad_input_is_told_in_one_message(tmp_path, pixels):
    for path, message in bad_inputs(tmp_path, pixels):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            open_pictures(path).read(range(1))


def test_statistics_of_an_npz(tmp_path, pixels):
    mu, sigma = np.zeros(4), np.eye(4)
    found = read_npz_statistics(saved(tmp_path / "a.npz", mu=mu, sigma=sigma))
    assert np.array_equal(found.sigma, sigma)
    assert found.mu_s is None
    assert read_npz_statistics(saved(tmp_path / "b.npz", arr_0=pixels)) is None
    for arrays, message in [
        ({"mu": mu}, "statistics are mu and sigma"),
        ({"mu": mu, "sigma": sigma, "mu_s": mu}, "mu_s with sigma_s"),
        ({"mu": mu, "sigma": np.eye(5)}, r"must be \(D,\) and \(D, D\)"),
        ({"mu": mu * np.nan, "sigma": sigma}, "NaN or infinite values"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_npz_statistics(saved(tmp_path / "c.npz", **arrays))
