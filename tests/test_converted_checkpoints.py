"""What a converted file is for: sampling, measuring, extracting; at the paper's evaluation size too."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from official_files import saved, tiny_gpt, tiny_text_gpt, tiny_tokenizer
from smalto import convert, evaluate, extract, sample
from smalto.data.encode import Recipe
from smalto.data.images import ImageShards
from smalto.data.picture_sets import open_pictures
from smalto.data.shards import CODES, read_meta
from smalto.data.source_idx import FashionMnist
from smalto.data.transforms import to_float
from smalto.prepare import prepare_images
from smalto.runtime import compose
from smalto.sampling.engine import EngineConfig
from smalto.tasks.checkpoint import load_tokenizer

LITE = ["features=lite0", "features.size=32", "mlflow=false", "device=cpu", "perceptual=none"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="module")
def images(home) -> Path:
    prepare_images(
        FashionMnist(),
        out=home / "images",
        recipe=Recipe("pad", 32, "png", 1),
        split="auto",
        val_fraction=0.2,
        limit=60,
        shuffle=True,
        seed=0,
        shard_size=32,
        workers=0,
        max_rejected=0,
        overwrite=False,
        description={},
        command="",
    )
    return home / "images"


def converted(home: Path, name: str, weights: dict, *options: str) -> Path:
    source = saved(home / f"{Path(name).stem}.pt", {"model": weights})
    convert.run(compose("convert", [f"in={source}", f"out={home / name}", *options]))
    return home / name


@pytest.fixture(scope="module")
def tokenizer(home) -> Path:
    return converted(home, "vq.safetensors", tiny_tokenizer(), "image_size=32", "format=safetensors")


@pytest.fixture(scope="module")
def generator(home, tokenizer) -> Path:
    size = ["image_size=16", "num_heads=2"]
    return converted(home, "gpt.ckpt", tiny_gpt(classes=10), *size, f"tokenizer_ckpt={tokenizer}")


def measured(ckpt: Path, *overrides: str) -> dict[str, float]:
    return evaluate.run(compose("evaluate", [f"ckpt={ckpt}", *LITE, *overrides]))


def test_extract(home, tokenizer, images):
    extract.run(
        compose(
            "extract",
            [
                f"tokenizer_ckpt={tokenizer}",
                f"data.path={images}",
                f"out={home / 'codes'}",
                "crops=center",
                "workers=0",
            ],
        )
    )
    meta = read_meta(home / "codes", CODES)
    assert (meta["codebook_size"], meta["code_shape"]) == (64, [[16, 16]])
    assert meta["tokenizer"]["fingerprint"] == load_tokenizer(tokenizer).fingerprint


def test_measure_a_tokenizer(tokenizer, images):
    values = measured(tokenizer, f"reference={images}")
    assert {"psnr", "ssim", "codebook_usage", "rfid_lite0_32"} <= values.keys()
    with pytest.raises(ValueError, match=r"vq\.safetensors knows of no reference images; give reference=IMAGES"):
        measured(tokenizer)


def test_measure_at_the_papers_size(home, tokenizer, images):
    """PSNR of reconstructions and images that were both resized as the authors do it, before rounding."""
    values = measured(
        tokenizer,
        f"reference={images}",
        "protocol.eval_size=16",
        "protocol.rounding=truncate",
        f"out={home / 'small.json'}",
    )
    data = ImageShards(
        path=images, image_size=32, batch_size=4, augment="none", flip_prob=0.0, num_workers=0, seed=0, val_batch_size=4
    )
    data.setup("validate")
    net = load_tokenizer(tokenizer).tokenizer
    scores = []
    for batch in data.val_dataloader():
        image = to_float(batch["image"])
        with torch.inference_mode():
            pair = [F.interpolate(x, size=(16, 16), mode="bicubic") for x in (net.decode(net.encode(image)), image)]
        ours, theirs = ((127.5 * x + 128.0).clamp(0, 255).byte().double() for x in pair)
        scores += [10 * np.log10(255**2 / error) for error in (ours - theirs).square().mean((1, 2, 3)).tolist()]
    assert values["psnr"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert json.loads((home / "small.json").read_text())["protocol"]["eval_size"] == 16


def test_sample_and_measure_a_generator(home, generator, images):
    options = ["num_images=4", "labels=[3,9]", "mlflow=false", "device=cpu"]
    out = sample.run(compose("sample", [f"ckpt={generator}", *options]))
    assert Path(out["out"]).is_relative_to(home / "gpt_results/samples")
    assert np.load(out["npz"])["arr_0"].shape == (4, 16, 16, 3)
    large = sample.run(compose("sample", [f"ckpt={generator}", *options, "eval_size=32", f"out={home / 'large'}"]))
    assert np.load(large["npz"])["arr_0"].shape == (4, 32, 32, 3)
    values = measured(generator, f"reference={images}", "num_samples=10", "protocol.eval_size=32", "batch_size=10")
    assert "fid_lite0_32" in values
    assert "loss" not in values, "which codes it was trained on is not known"
    grid = ["guidance_scales=[1,3]", "num_samples=[6,10]", f"save={home / 'saved'}", f"out={home / 'grid.json'}"]
    values = measured(generator, f"reference={images}", *grid)
    assert len([name for name in values if "/fid_" in name]) == 4
    assert np.load(home / "saved/cfg_scale3.npz")["arr_0"].shape == (10, 16, 16, 3)
    measured(generator, f"reference={images}", *grid[:2], f"save={home / 'later'}", grid[3])
    assert (home / "later/cfg_scale3.npz").exists(), "measured before, but not saved there"
    with pytest.raises(FileExistsError, match="is in use"):
        measured(generator, f"reference={images}", "num_samples=10", f"save={home / 'saved'}")


def png_and_pack(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images as files in the order of their numbers, and as packed, brought to that order."""
    files = np.stack([np.asarray(Image.open(file)) for file in sorted(folder.glob("*.png"))])
    packed = np.load(folder.parent / f"{folder.name}.npz")
    return files, packed["arr_0"][np.argsort(packed["index"])]


def test_every_setting_has_its_own_images(home, generator, images):
    """``cfg_scale1.5`` has no suffix ``.5``; numbers that differ late are different settings too."""
    save = home / "settings"
    asked = [f"reference={images}", "num_samples=6", f"out={home / 'settings.json'}"]
    grid = ["guidance_scales=[1.0,1.5]", "top_ps=[0.9,0.95,0.9500001]"]
    values = measured(generator, *asked, *grid, f"save={save}")
    assert len([name for name in values if "/fid_" in name]) == 6
    names = [f"cfg_scale{scale}-top_p{p}" for scale in ("1", "1.5") for p in ("0.9", "0.95", "0.9500001")]
    assert sorted(file.stem if file.suffix == ".npz" else file.name for file in save.glob("cfg*")) == sorted(2 * names)
    for name in names:
        files, packed = png_and_pack(save / name)
        assert np.array_equal(files, packed)
    different = {png_and_pack(save / name)[1].tobytes() for name in names[::2]}
    assert len(different) > 1, "each holds the images of its own setting"


def test_fewer_images_replace_more(home, generator, images):
    save, more = home / "replaced", [f"reference={images}", f"out={home / 'replaced.json'}"]
    measured(generator, *more, "num_samples=8", f"save={save}")
    before, _ = png_and_pack(save / "samples")
    (save / "samples/notes.txt").write_text("not an image of smalto")
    measured(generator, *more, "num_samples=5", "seed=1", f"save={save}", "overwrite=true")
    files, packed = png_and_pack(save / "samples")
    assert len(files) == len(packed) == 5
    assert np.array_equal(files, packed)
    assert not np.array_equal(files, before[:5])
    assert (save / "samples/notes.txt").exists(), "foreign files stay"
    measured(generator, *more, "num_samples=5", "seed=1", f"save={save}")  # measured already, saved already
    with pytest.raises(FileExistsError, match="is in use"):
        measured(generator, *more, "num_samples=8", f"save={save}")


def test_a_table_says_what_computed_and_is_of_these_weights(home, generator, images):
    changing = home / "changing.ckpt"
    changing.write_bytes(generator.read_bytes())
    asked = [f"reference={images}", "num_samples=6", f"out={home / 'changing.json'}"]
    first = measured(changing, *asked)
    protocol = json.loads((home / "changing.json").read_text())["protocol"]
    assert protocol["decoding"] == EngineConfig().computes_in(torch.device("cpu"))
    assert protocol["decoding"] != "auto"
    before = changing.stat()
    checkpoint = torch.load(changing, weights_only=True)
    with torch.no_grad():
        for name, tensor in checkpoint["state_dict"].items():
            if name.startswith("net.") and tensor.is_floating_point():
                tensor.copy_(tensor.flip(0))
    torch.save(checkpoint, changing)
    os.utime(changing, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert measured(changing, *asked) != first


def test_samples_as_shards_are_a_data_set_and_go_on_after_a_kill(home, generator, monkeypatch):
    options = [f"ckpt={generator}", "num_images=7", "labels=[3,9]", "mlflow=false", "device=cpu", "batch_size=2"]
    files = np.load(sample.run(compose("sample", [*options, f"out={home / 'files'}"]))["npz"])
    expected = files["arr_0"][np.argsort(files["index"])].transpose(0, 3, 1, 2)
    shards = [*options, f"out={home / 'shards'}", "format=wds", "shard_size=3"]
    drawn: list[list[int]] = []
    real = sample.draw_images

    def killed(*args, **settings):
        for batch in real(*args, **settings):
            if len(drawn) == 3:  # in the middle of the second shard
                raise KeyboardInterrupt
            drawn.append(list(batch.indices))
            yield batch

    monkeypatch.setattr(sample, "draw_images", killed)
    with pytest.raises(KeyboardInterrupt):
        sample.run(compose("sample", shards))
    assert sorted(path.name for path in (home / "shards").glob("*.tar*")) == ["train-00000.tar"]
    finished = (home / "shards/train-00000.tar").stat()

    def watched(*args, **settings):
        for batch in real(*args, **settings):
            drawn.append(list(batch.indices))
            yield batch

    monkeypatch.setattr(sample, "draw_images", watched)
    del drawn[:]
    out = Path(sample.run(compose("sample", shards))["out"])
    assert drawn == [[3, 4], [5], [6]], "a finished shard is not drawn again"
    assert (out / "train-00000.tar").stat().st_mtime_ns == finished.st_mtime_ns
    assert sorted(path.name for path in out.glob("train-*")) == [f"train-{i:05d}.tar" for i in range(3)]
    data = ImageShards(path=out, image_size=16, batch_size=7, augment="none", flip_prob=0.0, num_workers=0, seed=0)
    data.setup()
    batch = data.fetch_train(0, np.arange(7))
    assert np.array_equal(batch["image"].numpy(), expected)
    assert batch["label"].tolist() == [3, 9, 3, 9, 3, 9, 3]
    assert data.num_classes == 10
    pictures = open_pictures(out, split=None)
    assert np.array_equal(pictures.read(range(7)).numpy(), expected)
    assert (out / "sheet.png").read_bytes() == (home / "files/sheet.png").read_bytes()
    with pytest.raises(FileExistsError, match="shard_size: 3 there, 4 now"):
        sample.run(compose("sample", [*shards[:-1], "shard_size=4"]))
    for wrong in ("format=tar", "num_images=0", "shard_size=0"):
        key, value = wrong.split("=")
        with pytest.raises(ValueError, match=f"{key} is '?{value}'?, must be"):
            sample.run(compose("sample", [*options, "format=wds", wrong, f"out={home / 'none'}"]))


def test_a_generator_without_a_tokenizer_says_so(home, images):
    ckpt = converted(home, "alone.ckpt", tiny_gpt(classes=10), "image_size=16", "num_heads=2", "downsample_factor=2")
    with pytest.raises(ValueError, match="tokenizer_ckpt=PATH"):
        measured(ckpt, f"reference={images}", "num_samples=10")


def test_text_generators_are_refused_by_sample(home):
    ckpt = converted(home, "t2i.ckpt", tiny_text_gpt(), "image_size=16", "num_heads=2", "downsample_factor=2")
    with pytest.raises(ValueError, match="conditioned on text"):
        sample.run(compose("sample", [f"ckpt={ckpt}"]))
