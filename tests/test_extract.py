import hashlib
import json
import shutil
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from smalto.data.codes import CodeReader, CodeShards
from smalto.data.encode import Recipe
from smalto.data.images import ImageShards
from smalto.data.npy_import import import_codes
from smalto.data.reader import ImageReader
from smalto.data.shards import CODES, IMAGES, read_meta
from smalto.data.source_idx import FashionMnist
from smalto.data.transforms import TEN_CROPS, ten_crops, to_float
from smalto.extract import extract_codes
from smalto.prepare import prepare_images
from smalto.runtime import compose

SIZE, GRID, CODEBOOK = 16, 4, 64


class Averages(nn.Module):
    """Code of a patch: its mean brightness; no weights, so codes can be predicted from pixels."""

    calls = 0

    def encode(self, image: Tensor) -> Tensor:
        assert image.dtype == torch.float32
        assert image.shape[1:] == (3, SIZE, SIZE)
        assert torch.is_inference_mode_enabled()
        type(self).calls += 1
        brightness = nn.functional.avg_pool2d(image.mean(1, keepdim=True), SIZE // GRID).flatten(1)
        return ((brightness + 1) / 2 * CODEBOOK).long().clamp(0, CODEBOOK - 1)


@dataclass
class Stub:
    tokenizer: nn.Module = field(default_factory=Averages)
    codebook_size: int = CODEBOOK
    code_shape: tuple = ((GRID, GRID),)
    image_size: int = SIZE
    fingerprint: str = "0123456789abcdef"
    path: str = "stub.ckpt"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    out = tmp_path_factory.mktemp("images") / "fashion"
    prepare_images(
        FashionMnist(),
        out=out,
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
    return out


def extract(images, out, tokenizer=None, **changes):
    options = {
        "crops": "ten",
        "crop_range": None,
        "batch_size": 64,
        "block_size": 7,
        "shard_size": 20,
        "workers": 0,
        "device": "cpu",
        "overwrite": False,
    }
    return extract_codes(tokenizer or Stub(), data=images, out=out, **(options | changes))


def codes_of(out, **changes):
    options = {"batch_size": 4, "seed": 0, "codebook_size": CODEBOOK, "code_shape": [[GRID, GRID]], "crops": "all"}
    data = CodeShards(path=out, **(options | changes))
    data.setup()
    return data


def digests(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.tar")}


def test_codes_are_those_of_the_images(images, tmp_path):
    summary = extract(images, tmp_path, crops="center_flip")
    assert summary["crops"] == ["center", "center_flip"]
    pixels = ImageShards(
        path=images, image_size=SIZE, batch_size=4, augment="center_crop", flip_prob=0, num_workers=0, seed=0
    )
    pixels.setup()
    data = codes_of(tmp_path, crops="center")
    assert (data.num_train, data.num_val) == (pixels.num_train, pixels.num_val)
    assert data.classes == pixels.classes
    for fetch, count in (("fetch_train", data.num_train), ("fetch_val", data.num_val)):
        image = getattr(pixels, fetch)(0, np.arange(count))
        code = getattr(data, fetch)(0, np.arange(count))
        with torch.inference_mode():
            expected = Averages().encode(to_float(image["image"]))
        assert torch.equal(code["codes"], expected)
        assert torch.equal(code["label"], image["label"])


def test_ten_crops_are_stored_in_order(images, tmp_path):
    extract(images, tmp_path, crop_range=[1.25])
    meta = read_meta(tmp_path, CODES)
    assert meta["crops"] == list(TEN_CROPS)
    reader, codes = ImageReader(images, read_meta(images, IMAGES), "val"), CodeReader(tmp_path, meta, "val")
    crops = torch.from_numpy(ten_crops(reader.read(3), SIZE, 1.25)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = Averages().encode(to_float(crops))
    assert np.array_equal(codes.gather(np.full(10, 3), np.arange(10)), expected)


def test_meta(images, tmp_path):
    extract(images, tmp_path, crop_range=[1.25, 1.5])
    meta = read_meta(tmp_path, CODES)
    assert meta["codebook_size"] == CODEBOOK
    assert meta["code_shape"] == [[GRID, GRID]]
    assert meta["tokenizer"] == {"path": "stub.ckpt", "fingerprint": "0123456789abcdef"}
    assert meta["images"]["sha256"] == hashlib.sha256((images / "meta.json").read_bytes()).hexdigest()
    assert meta["dtype"] == "uint16"
    assert meta["crops"][4] == "center@1.25"
    assert meta["crops"][-1] == "center_flip@1.5"
    assert meta["num_classes"] == 10
    for split in meta["splits"].values():
        assert split["num_images"] == sum(s["num_images"] for s in split["shards"])
        assert all(s["num_images"] == 21 for s in split["shards"][:-1])  # whole blocks of 7
        assert all(digests(tmp_path)[s["name"]] == s["sha256"] for s in split["shards"])


def test_bytes_depend_neither_on_workers_nor_on_the_batch(images, tmp_path):
    # this tokenizer's codes do not change with the batch; a network's could in the last bit
    for name, changes in {"a": {}, "b": {"workers": 2}, "c": {"batch_size": 33}, "d": {"batch_size": 1}}.items():
        extract(images, tmp_path / name, crop_range=[1.25], **changes)
    assert len({tuple(sorted(digests(tmp_path / name).items())) for name in "abcd"}) == 1


class Stops(Averages):
    """Interrupted after some forward passes."""

    def encode(self, image: Tensor) -> Tensor:
        self.passes = getattr(self, "passes", 0) + 1
        if self.passes > 4:
            raise KeyboardInterrupt
        return super().encode(image)


def test_an_interrupted_job_goes_on_at_the_block(images, tmp_path):
    options = {"crop_range": [1.25], "batch_size": 70}  # a block in a pass
    extract(images, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "cut", Stub(tokenizer=Stops()), **options)
    assert list(digests(tmp_path / "cut")) == ["train-00000.tar"]
    assert [p.name for p in (tmp_path / "cut" / "parts").iterdir()] == ["train-000003.npy"]
    Averages.calls = 0
    assert extract(images, tmp_path / "cut", **options)["status"] == "written"
    total = sum(
        -(-n // 7) for n in (read_meta(tmp_path / "cut", CODES)["splits"][s]["num_images"] for s in ("train", "val"))
    )
    assert Averages.calls == total - 4
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert not (tmp_path / "cut" / "parts").exists()


def test_a_block_without_its_end_is_encoded_again(images, tmp_path):
    """Older versions may have left one after a power cut."""
    extract(images, tmp_path / "whole", crop_range=[1.25])
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "cut", Stub(tokenizer=Stops()), crop_range=[1.25], batch_size=70)
    for size in (-1, 0):
        folder = shutil.copytree(tmp_path / "cut", tmp_path / f"cut{size}")
        part = folder / "parts" / "train-000003.npy"
        part.write_bytes(part.read_bytes()[:size])
        extract(images, folder, crop_range=[1.25])
        assert digests(folder) == digests(tmp_path / "whole")


def test_a_refused_job_keeps_what_it_was_to_replace(images, tmp_path):
    extract(images, tmp_path / "out", crops="center")
    was = digests(tmp_path / "out")
    broken = shutil.copytree(images, tmp_path / "images")
    shard = broken / "val-00000.tar"
    shard.write_bytes(shard.read_bytes().replace(b"ustar", b"USTAR"))
    with pytest.raises(ValueError, match=r"val-00000.tar is not a plain tar"):
        extract(broken, tmp_path / "out", crops="center_flip", overwrite=True)
    assert digests(tmp_path / "out") == was
    assert extract(images, tmp_path / "out", crops="center")["status"] == "reused"


def test_codes_do_not_take_the_place_of_the_images_they_come_from(images):
    before = sorted(path.name for path in images.iterdir())
    with pytest.raises(FileExistsError, match="is where smalto extract reads from"):
        extract(images, images, crops="center", overwrite=True)
    assert sorted(path.name for path in images.iterdir()) == before


def test_running_again_reuses(images, tmp_path):
    extract(images, tmp_path, crop_range=[1.25])
    Averages.calls = 0
    assert extract(images, tmp_path, crop_range=[1.25], batch_size=5)["status"] == "reused"
    assert Averages.calls == 0
    with pytest.raises(FileExistsError, match=r"crop_range: \[1.25\] there, \[1.5\] now"):
        extract(images, tmp_path, crop_range=[1.5])
    with pytest.raises(FileExistsError, match="tokenizer: 0123456789abcdef there, other now"):
        extract(images, tmp_path, Stub(fingerprint="other"), crop_range=[1.25])
    assert extract(images, tmp_path, crop_range=[1.5], overwrite=True)["status"] == "written"


def test_a_large_codebook_is_stored_in_four_bytes(images, tmp_path):
    extract(images, tmp_path, Stub(codebook_size=70_000), crops="center")
    assert read_meta(tmp_path, CODES)["dtype"] == "uint32"
    assert codes_of(tmp_path, codebook_size=70_000).fetch_val(0, np.arange(2))["codes"].max() < CODEBOOK


@pytest.mark.parametrize(
    ("stub", "words"),
    [
        (Stub(codebook_size=3), "codes from 0 to .*codebook has 3"),
        (Stub(code_shape=((5, 5),)), "its code_shape says 25"),
    ],
)
def test_a_tokenizer_that_does_otherwise_than_it_says(images, tmp_path, stub, words):
    with pytest.raises(ValueError, match=words):
        extract(images, tmp_path, stub, crops="center")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crops": "nine"}, "crops is 'nine'"),
        ({"crop_range": []}, "crop_range is"),
        ({"crop_range": [0.9]}, "at least 1"),
        ({"crop_range": [1.0]}, "all five crops are the same"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_wrong_settings_are_explained(images, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        extract(images, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [2**32 + 1, 2**36])
def test_codes_beyond_what_can_be_stored_are_refused_before_anything_is_written(images, tmp_path, size):
    with pytest.raises(ValueError, match=f"codebook_size is {size}"):
        extract(images, tmp_path / "out", Stub(codebook_size=size), crops="center")
    assert not (tmp_path / "out").exists()


def test_labels_outside_the_classes_are_refused_before_the_work(images, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    meta = json.loads((tmp_path / "in" / "meta.json").read_text())
    (tmp_path / "in" / "meta.json").write_text(json.dumps(meta | {"num_classes": 9}))
    before = Averages.calls
    with pytest.raises(ValueError, match=r"labels of train in .* are outside 0 to 8, the first is 9"):
        extract(tmp_path / "in", tmp_path / "out", crops="center")
    assert Averages.calls == before


def npy_codes(folder, codes, labels):
    for kind, arrays in (("codes", codes), ("labels", labels)):
        (folder / f"x_{kind}").mkdir(parents=True, exist_ok=True)
        for number, array in enumerate(arrays):
            np.save(folder / f"x_{kind}" / f"{number}.npy", array)
    return folder


@pytest.mark.parametrize(
    ("code", "label", "words"),
    [
        (2**33 + 5, 0, f"codes from .* to {2**33 + 5}"),
        (1.5, 0, "holds float64; codes and labels are whole numbers"),
        (1, -1, "has the label -1; labels count from 0"),
        (1, 2**40, f"has the label {2**40}"),
        (1, 0.5, "x_labels/1.npy holds float64"),
    ],
)
def test_codes_of_others_are_stored_as_they_are_or_refused(tmp_path, code, label, words):
    codes = [np.ones((1, 1, GRID * GRID), np.int64), np.full((1, 1, GRID * GRID), code)]
    folder = npy_codes(tmp_path / "in", codes, [np.array([0]), np.array([label])])
    with pytest.raises(ValueError, match=words):
        import_codes(Stub(), {"train": folder}, out=tmp_path / "out", block_size=4, shard_size=4, overwrite=False)


def test_missing_images_say_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="smalto prepare"):
        extract(tmp_path / "no", tmp_path / "out", crops="center")


def test_the_config_takes_a_named_data_set_or_a_folder():
    named = compose("extract", ["tokenizer_ckpt=t", "data=fashion_mnist", "out=o"])
    assert named.data.path.endswith("fashion_mnist")
    assert compose("extract", ["tokenizer_ckpt=t", "data.path=/x", "out=o"]).data.path == "/x"


def test_bf16_says_how_many_codes_it_keeps(images, tmp_path, make_vq):
    tokenizer = Stub(make_vq(image_size=SIZE).requires_grad_(False), codebook_size=make_vq().codebook_size)
    tokenizer.code_shape = tokenizer.tokenizer.code_shape
    exact = extract(images, tmp_path / "fp32", tokenizer, crops="center")
    assert "code_agreement" not in exact
    assert "precision" not in read_meta(tmp_path / "fp32", CODES)
    rough = extract(images, tmp_path / "bf16", tokenizer, crops="center", precision="bf16")
    meta = read_meta(tmp_path / "bf16", CODES)
    assert meta["precision"] == "bf16"
    assert meta["code_agreement"] == rough["code_agreement"]
    assert meta["code_agreement_images"] == 16
    assert 0.3 < rough["code_agreement"] <= 1
    with pytest.raises(FileExistsError, match="precision"):
        extract(images, tmp_path / "bf16", tokenizer, crops="center")


def test_unknown_precision_is_refused_before_anything_is_written(images, tmp_path):
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        extract(images, tmp_path / "codes", crops="center", precision="fp8")
    assert not (tmp_path / "codes").exists()
