"""``smalto evaluate`` on images made elsewhere: what goes in, what is said, what is left behind."""

import json

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from forked_ranks import run_ranks
from picture_files import make_pixels, write_folder, write_npz
from smalto import evaluate
from smalto.data.transforms import to_pixels
from smalto.evaluation.references import find_reference
from smalto.metrics.lite0 import Lite0Features
from smalto.runtime import compose

LITE = ["features=lite0", "features.size=32", "perceptual=squeeze_caffe", "mlflow=false", "device=cpu"]


@pytest.fixture
def sets(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))
    real, fake = make_pixels(60, seed=0), make_pixels(50, seed=1, shift=0.1)
    return write_folder(tmp_path / "real", real), write_npz(tmp_path / "fake.npz", fake)


def config(*overrides) -> DictConfig:
    return compose("evaluate", [*LITE, *map(str, overrides)])


def run(*overrides) -> dict[str, float]:
    return evaluate.run(config(*overrides))


def test_two_sets_of_images(sets, capsys):
    real, fake = sets
    values = run(f"samples={fake}", f"reference={real}", "protocol.rules.kid_subset_size=20")
    assert {f"{name}_lite0_32" for name in ("fid", "sfid", "is", "kid", "precision", "recall")} == set(values)
    text = capsys.readouterr().out
    for said in ("std. error", "not computed: class_accuracy_lite0_32", "features: lite0_32", "num_samples: 50"):
        assert said in text
    same = run(f"samples={real}", f"reference={real}")
    assert same["fid_lite0_32"] < 1e-6
    assert same["precision_lite0_32"] == same["recall_lite0_32"] == 1.0


def test_result_is_kept_by_its_protocol(sets, tmp_path, caplog):
    caplog.set_level("INFO")
    real, fake = sets
    asked = (f"samples={fake}", f"reference={real}")
    first = run(*asked)
    assert run(*asked) == first
    assert "measured already" in caplog.text
    half = run(*asked, "protocol.rules.distance_dtype=fp16")
    assert half["fid_lite0_32"] == first["fid_lite0_32"]
    files = list((tmp_path / "outputs/evaluations").iterdir())
    assert len(files) == 2, "two protocols, two files, and nothing half-done"
    found = json.loads(files[0].read_text())
    assert found["rows"][0]["not_computed"]["class_accuracy_lite0_32"].startswith("the real images came without")
    assert found["protocol"]["reference_images"] == 60
    assert len(found["protocol"]["reference_hash"]) == 12


def test_counts_of_samples(sets):
    real, fake = sets
    values = run(f"samples={fake}", f"reference={real}", "num_samples=[20,40]")
    assert values["num_samples=20/fid_lite0_32"] > values["num_samples=40/fid_lite0_32"]
    with pytest.raises(ValueError, match="holds 50 images, 80 are needed"):
        run(f"samples={fake}", f"reference={real}", "num_samples=80")
    with pytest.raises(ValueError, match="50000 are needed"):
        run(f"samples={fake}", f"reference={real}", "protocol=adm", "features=lite0", "features.size=32")


def test_two_processes_share_the_work(sets, tmp_path):
    real, fake = sets
    asked = (f"samples={fake}", f"reference={real}", "batch_size=7")
    expected = run(*asked, f"paths.references={tmp_path / 'one'}", f"out={tmp_path / 'one.json'}")

    def evaluated(rank):
        return run(*asked, f"paths.references={tmp_path / 'two'}", f"out={tmp_path / 'two.json'}")

    first, second = run_ranks(evaluated, 2)
    # Other numbers of threads may add in another order in the network.
    assert first == pytest.approx(expected, rel=1e-4), first
    assert second == {}
    assert len(list((tmp_path / "two").iterdir())) == 1


def test_reconstructions_made_elsewhere(sets, tmp_path, capsys):
    real, _ = sets
    rebuilt = write_folder(tmp_path / "rebuilt", make_pixels(60, seed=0) // 4 * 4)
    values = run(f"samples={rebuilt}", f"reference={real}", "kind=reconstruction")
    assert {"psnr", "ssim", "rfid_lite0_32", "rsfid_lite0_32"} == set(values)
    assert "not computed: lpips_squeeze_caffe: needs images of at least 17 px, got 16" in capsys.readouterr().out
    assert 35 < values["psnr"] < 50
    limited = run(f"samples={rebuilt}", f"reference={real}", "kind=reconstruction", "protocol.ssim_data_range=2.0")
    assert limited["ssim"] > values["ssim"]


def test_reference_alone_is_measured_and_kept(sets, tmp_path):
    real, fake = sets
    assert run(f"reference={real}") == {"reference_images": 60.0}
    file = next((tmp_path / "outputs/references").glob("*.npz"))
    by_file = run(f"samples={fake}", f"reference={file}")
    assert by_file == run(f"samples={fake}", f"reference={real}")
    with pytest.raises(ValueError, match="is for generation, asked for was reconstruction"):
        run(f"samples={fake}", f"reference={file}", "kind=reconstruction")


def test_samples_of_another_size_than_the_protocols_are_refused(sets):
    real, fake = sets
    with pytest.raises(ValueError, match="has images of 16 px, protocol=smalto measures at 8"):
        run(f"samples={fake}", f"reference={real}", "protocol.eval_size=8")


def test_presets_are_the_published_rules():
    adm, paper = (compose("evaluate", [f"protocol={name}", "reference=x"]) for name in ("adm", "llamagen"))
    for preset in (adm, paper):
        assert preset.features._target_.endswith("InceptionFeatures")
        assert (preset.protocol.labels, preset.protocol.rounding) == ("random", "truncate")
        assert preset.protocol.rules.distance_dtype == "fp16"
        assert preset.protocol.rules.split_remainder == "adm"
        assert evaluate.counts(preset) == [50_000]
    assert (adm.protocol.eval_size, paper.protocol.eval_size) == (None, 256)
    assert (adm.protocol.ssim_data_range, paper.protocol.ssim_data_range) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], "nothing to measure"),
        (["ckpt=a.ckpt", "samples=b"], "both given"),
        (["reference=x", "kind=training"], "must be generation or reconstruction"),
        (["reference=x", "protocol.labels=even", "kind=training"], "must be generation or.*balanced or random"),
        (["reference=x", "batch_size=0"], "batch_size is 0"),
        (["reference=x", "num_samples=1"], "at least 2"),
        (["reference=x", "reference_split=test"], "train or val"),
        (["reference=nowhere"], "no folder, .npz file or image shards at nowhere"),
        (["reference=x", "protocol.rules.max_pool=-1"], "max_pool is -1"),
    ],
)
def test_mistakes_are_told_at_once(overrides, said):
    with pytest.raises(Exception, match=said):
        run(*overrides)


def test_broken_pictures_are_not_measured():
    image = torch.zeros(3, 3, 4, 4)
    image[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 of 3 images hold NaN"):
        to_pixels(image)


def test_reference_of_another_size_is_another_reference(sets, tmp_path, lite0_32):
    real, _ = sets
    rules = evaluate.build(config("reference=x").protocol.rules)
    given = {"features": lite0_32, "kind": "generation", "rules": rules, "cache_dir": tmp_path / "cache"}
    whole = find_reference(real, **given)
    cropped = find_reference(real, image_size=8, **given)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not np.allclose(whole.gaussian.mean, cropped.gaussian.mean)


@pytest.fixture
def lite0_32():
    return Lite0Features(size=32)
