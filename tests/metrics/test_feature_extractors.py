import hashlib
import logging

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image

from smalto.metrics import inception
from smalto.metrics import lite0 as lite0_module
from smalto.metrics.inception import InceptionFeatures, auto_features
from smalto.metrics.lite0 import Lite0Features


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """A file of the right shape with random weights, and its true sha256 prefix."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / inception.INCEPTION_FILE
    original = torch.hub.load_state_dict_from_url
    module = FeatureExtractorInceptionV3.__init__.__globals__
    try:
        module["load_state_dict_from_url"] = lambda *args, **kwargs: {}
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    finally:
        module["load_state_dict_from_url"] = original
        del FeatureExtractorInceptionV3.load_state_dict
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()[:8], network


def test_folding_changes_nothing(lite0, real):
    """The folded network is the package's own network, up to rounding."""
    network = lite0_module._load_lite0()
    image = real[0][:8]
    resized = F.interpolate(image.float(), size=(64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = network.extract_features((resized - 127) / 128).mean(dim=(2, 3))
        logits = network._fc(expected)
    found = lite0(image)
    # 60 float32 layers with values up to 6: 1e-4 is a few rounding errors deep.
    torch.testing.assert_close(found.pool, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.logits, logits, atol=1e-4, rtol=1e-4)


def test_batch_size_and_order_do_not_matter(lite0, real):
    image = real[0][:40]
    whole = lite0(image)
    parts = [lite0(part) for part in image.split([1, 16, 23])]
    torch.testing.assert_close(whole.pool, torch.cat([p.pool for p in parts]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.pool.flip(0), lite0(image.flip(0)).pool, atol=1e-4, rtol=1e-4)
    assert lite0(image[:0]).pool.shape == (0, 1280)


def test_is_frozen_and_stays_in_eval(lite0, real):
    before = lite0(real[0][:4]).pool
    lite0.train()
    assert not any(module.training for module in lite0.modules())
    assert not any(p.requires_grad for p in lite0.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = lite0(real[0][:4]).pool
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_global_generator_is_untouched(real):
    state = torch.get_rng_state()
    Lite0Features(size=32)(real[0][:2])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_refuses_anything_but_uint8_rgb(lite0, bad):
    with pytest.raises(ValueError, match=r"uint8 \(B, 3, H, W\)"):
        lite0(bad)


def test_size_is_in_the_name_and_checked():
    assert Lite0Features(size=96).name == "lite0_96"
    with pytest.raises(ValueError, match="multiples of 32"):
        Lite0Features(size=100)


def test_recognises_real_photos():
    """The weights and the input scaling are right: a known photograph gets a known ImageNet class."""
    image = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).unsqueeze(0)
    assert int(Lite0Features(size=224)(image[:, :, :, 106:533]).logits.argmax()) == 985  # daisy


def test_wrong_weight_file_is_refused(tmp_path):
    path = tmp_path / inception.INCEPTION_FILE
    with pytest.raises(FileNotFoundError, match="features=lite0"):
        InceptionFeatures(weights=path)
    torch.save({}, path)
    with pytest.raises(ValueError, match="sha256"):
        InceptionFeatures(weights=path)


def test_inception_loads_completely_or_not_at_all(inception_file, monkeypatch, real):
    path, prefix, network = inception_file
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", prefix)
    extractor = InceptionFeatures(weights=path)
    found = extractor(real[0][:2])
    assert extractor.name == "inception"
    assert found.pool.shape == (2, 2048)
    assert found.logits.shape == (2, 1008)
    # Channels-last changes the order of sums; 1e-3 relative is far below what other weights would give.
    torch.testing.assert_close(found.pool, network(real[0][:2])[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.logits, found.pool @ network.fc.weight.T)  # no bias

    state = torch.load(path, weights_only=True)
    state.pop("fc.weight")
    torch.save(state, path.with_name("half.pth"))
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", "")
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        InceptionFeatures(weights=path.with_name("half.pth"))


def test_auto_prefers_inception_and_says_so(inception_file, monkeypatch, tmp_path, caplog):
    path, prefix, _ = inception_file
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", prefix)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert auto_features(size=32).name == "lite0_32"
    assert "no inception file" in caplog.text
    cache = tmp_path / "hub" / "checkpoints" / inception.INCEPTION_FILE
    cache.parent.mkdir(parents=True)
    cache.symlink_to(path)
    assert auto_features(size=32).name == "inception"
    with pytest.raises(FileNotFoundError):
        auto_features(weights=tmp_path / "missing.pth")


def test_features_do_not_depend_on_the_batch(lite0, real):
    """To the last bit: the network always sees chunks of one shape, so kernels and sums are the same."""
    image = real[0][:45]
    whole = lite0(image)
    parts = [lite0(part) for part in image.split([1, 16, 20, 8])]
    for name in ("pool", "spatial", "logits"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name


def test_spatial_features_know_where_things_are(lite0, real):
    """A mirrored picture has nearly the same pooled features and quite other spatial ones."""
    image = real[0][:40]
    here, mirrored = lite0(image), lite0(image.flip(3))
    assert here.spatial.shape == (40, 7 * 4 * 4) == (40, lite0.num_spatial)

    def change(name: str) -> float:
        a, b = getattr(here, name), getattr(mirrored, name)
        return float((a - b).norm() / (a - a.mean(0)).norm())

    assert change("spatial") > 1.5 * change("pool")


def test_inceptions_spatial_features_are_the_first_channels_of_mixed_6(inception_file, monkeypatch, real):
    path, prefix, network = inception_file
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", prefix)
    extractor = InceptionFeatures(weights=path)
    kept = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, given, result: kept.append(result))
    network.features_list = ["2048"]
    network(real[0][:2])
    found = extractor(real[0][:2])
    assert found.spatial.shape == (2, 2023) == (2, extractor.num_spatial)
    torch.testing.assert_close(found.spatial, kept[0][:, :7].flatten(1), atol=1e-4, rtol=1e-3)
