import gzip
import hashlib
import io
import logging
import pickle
import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import smalto
from smalto.losses import perceptual
from smalto.losses.perceptual import PerceptualLoss


@pytest.fixture(scope="module")
def squeeze():
    return PerceptualLoss(net="squeeze_caffe")


@pytest.fixture(scope="module")
def images():
    """Garments, float (16, 3, 32, 32) in [-1, 1]; much of them constant black."""
    path = Path(smalto.__file__).parent / "data" / "fashion_mnist" / "t10k-images-idx3-ubyte.gz"
    pixels = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=16).reshape(-1, 1, 28, 28)[:16]
    padded = nn.functional.pad(torch.from_numpy(pixels.copy()), (2, 2, 2, 2)).repeat(1, 3, 1, 1)
    return padded.float() / 127.5 - 1


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random weights in torchvision's naming, and the file's true sha256 prefix."""
    with torch.device("meta"):
        shapes = torchvision.models.vgg16().state_dict()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in shapes.items():
        if key.startswith("features."):
            fan_in = value[0].numel() if value.dim() == 4 else 1
            scale = (2 / fan_in) ** 0.5 if value.dim() == 4 else 0.1
            state[key] = scale * torch.randn(value.shape, generator=generator)
    path = tmp_path_factory.mktemp("weights") / perceptual.VGG_FILE
    torch.save(state, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def distance(loss, x, y):
    with torch.no_grad():
        return loss(x, y)


def test_equals_the_lpips_package(squeeze, images):
    """Same numbers as lpips' own forward, and as measured when the weights were first adapted."""
    other = images.flip(0)
    expected = squeeze._constant[0](images, other).flatten()
    torch.testing.assert_close(distance(squeeze, images, other), expected, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    torch.testing.assert_close(distance(squeeze, a, b), torch.tensor([0.1596, 0.1527]), atol=1e-4, rtol=0)


def test_grows_with_blur_and_noise(squeeze, images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = [float(distance(squeeze, images, images + s * noise).mean()) for s in (0, 0.05, 0.15, 0.4)]
    blurred = [
        float(distance(squeeze, images, torchvision.transforms.functional.gaussian_blur(images, 9, s)).mean())
        for s in (0.01, 0.7, 1.5, 3.0)
    ]
    assert noisy == sorted(noisy)
    assert blurred == sorted(blurred)
    assert noisy[0] == 0.0
    assert noisy[-1] > 0.1
    assert blurred[-1] > 0.1


def test_symmetric_per_image_and_batch_independent(squeeze, images):
    other = images.roll(3, dims=3)
    whole = distance(squeeze, images, other)
    assert whole.shape == (16,)
    assert (whole > 0).all()
    torch.testing.assert_close(whole, distance(squeeze, other, images))
    parts = [distance(squeeze, x, y) for x, y in zip(images.split(5), other.split(5), strict=True)]
    torch.testing.assert_close(whole, torch.cat(parts), atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_image_and_are_finite_where_features_are_zero(squeeze, images):
    x = images.clone().requires_grad_()
    squeeze(x, images.flip(0)).sum().backward()
    assert x.grad.isfinite().all()
    assert float(x.grad.abs().sum()) > 0
    # A feature vector of exactly zero: sqrt alone would give 0 / 0.
    level = torch.zeros(1, 4, 2, 2, requires_grad=True)
    perceptual._unit(level).sum().backward()
    assert level.grad.isfinite().all()


def test_gradient_is_the_derivative(squeeze):
    loss = PerceptualLoss(net="squeeze_caffe").double()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 3, 20, 20, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2))
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    loss(x, y).sum().backward()
    step = 1e-6
    with torch.no_grad():
        difference = (loss(x + step * direction, y) - loss(x - step * direction, y)) / (2 * step)
    # ReLUs and max-pools may switch within the step: 1e-3 leaves room for that.
    assert float((x.grad * direction).sum()) == pytest.approx(float(difference), rel=1e-3)


class Parent(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.perceptual = loss


def test_is_invisible_to_its_parent(images):
    parent = Parent(PerceptualLoss(net="squeeze_caffe"))
    assert set(parent.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(parent.parameters())) == 2
    parent.load_state_dict(nn.ModuleDict({"layer": nn.Linear(2, 2)}).state_dict(), strict=True)
    before = distance(parent.perceptual, images, images.flip(0))
    parent.train()
    network = parent.perceptual._constant[0]
    assert not any(module.training for module in network.modules())  # dropout stays off
    assert torch.equal(before, distance(parent.perceptual, images, images.flip(0)))
    assert not any(p.requires_grad for p in network.parameters())


def test_follows_its_parent():
    parent = Parent(PerceptualLoss(net="squeeze_caffe"))
    parent.to(torch.float64)
    assert {p.dtype for p in parent.perceptual._constant[0].parameters()} == {torch.float64}
    parent.to("meta")
    assert {p.device.type for p in parent.perceptual._constant[0].parameters()} == {"meta"}


def test_has_its_values_even_when_built_late(squeeze, images):
    state = torch.get_rng_state()
    with torch.device("meta"):
        late = PerceptualLoss(net="squeeze_caffe")
    torch.testing.assert_close(distance(late, images, images.flip(0)), distance(squeeze, images, images.flip(0)))
    assert torch.equal(state, torch.get_rng_state())


def test_bfloat16_autocast(squeeze, images):
    full = distance(squeeze, images, images.flip(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = distance(squeeze, images, images.flip(0))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.05, atol=0.0)  # bfloat16 has 3 digits, seven levels of them


def test_smallest_sizes(squeeze):
    assert distance(squeeze, torch.zeros(1, 3, 17, 17), torch.ones(1, 3, 17, 17)).isfinite().all()
    with pytest.raises(ValueError, match="at least 17 x 17, got 17 x 16"):
        squeeze(torch.zeros(1, 3, 17, 16), torch.zeros(1, 3, 17, 16))
    with pytest.raises(ValueError, match="compares two"):
        squeeze(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))


def test_vgg_from_a_file(vgg_file, monkeypatch, images):
    path, prefix = vgg_file
    monkeypatch.setattr(perceptual, "VGG_SHA256_PREFIX", prefix)
    loss = PerceptualLoss(net="vgg", weights=path)
    assert loss.name == "lpips_vgg"
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    state = torch.load(path, weights_only=True)
    reference.net.load_state_dict(
        {key: state["features." + key.split(".", 1)[1]] for key in reference.net.state_dict()}
    )
    with torch.no_grad():
        expected = reference(images, images.flip(0)).flatten()
    torch.testing.assert_close(distance(loss, images, images.flip(0)), expected, atol=1e-5, rtol=1e-4)
    assert distance(loss, images[..., :16, :16], -images[..., :16, :16]).isfinite().all()


def test_auto_says_what_it_took(vgg_file, monkeypatch, tmp_path, caplog):
    path, prefix = vgg_file
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(perceptual, "VGG_SHA256_PREFIX", prefix)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert PerceptualLoss().name == "lpips_squeeze_caffe"
    assert "squeeze_caffe (VGG16 file not at" in caplog.text
    cache = tmp_path / "hub" / "checkpoints" / perceptual.VGG_FILE
    cache.parent.mkdir(parents=True)
    cache.symlink_to(path)
    assert PerceptualLoss().name == "lpips_vgg"


def test_wrong_files_and_options_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="perceptual=squeeze_caffe"):
        PerceptualLoss(net="vgg", weights=tmp_path / "missing.pth")
    torch.save({}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="sha256"):
        PerceptualLoss(net="vgg", weights=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no effect"):
        PerceptualLoss(net="squeeze_caffe", weights=tmp_path / "other.pth")
    with pytest.raises(ValueError, match="must be auto"):
        PerceptualLoss(net="alex")


def test_unpickler_runs_no_code():
    with pytest.raises(pickle.UnpicklingError, match="not allowed"):
        perceptual._ArrayUnpickler(io.BytesIO(pickle.dumps(print))).load()
