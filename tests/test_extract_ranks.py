"""Extraction shared by processes, with text, and the authors' layout."""

import errno
import hashlib

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from forked_ranks import run_ranks
from smalto.data.npy_export import export_npy
from smalto.data.npy_import import import_codes
from smalto.data.reader import ImageReader
from smalto.data.shards import CODES, IMAGES, read_meta, tar_members
from smalto.files import FileLock
from test_extract import CODEBOOK, GRID, SIZE, Stops, Stub, codes_of, digests, extract, images  # noqa: F401

RANGES = [1.25, 1.5]


def extract_as_ranks(images, out, world_size: int) -> list:  # noqa: F811
    """What each of ``world_size`` processes returned, or how it failed."""
    return run_ranks(lambda rank: extract(images, out, crop_range=RANGES), world_size)


def test_ranks_write_the_bytes_of_one_process_and_go_on_for_each_other(images, tmp_path):  # noqa: F811
    extract(images, tmp_path / "one", crop_range=RANGES)
    results = extract_as_ranks(images, tmp_path / "three", 3)
    assert [result["status"] for result in results] == ["written"] * 3
    assert digests(tmp_path / "three") == digests(tmp_path / "one")
    assert read_meta(tmp_path / "three", CODES) == read_meta(tmp_path / "one", CODES)
    assert not (tmp_path / "three" / "parts").exists()
    # what one process left unfinished, two finish
    with pytest.raises(KeyboardInterrupt):
        extract(images, tmp_path / "cut", Stub(tokenizer=Stops()), crop_range=RANGES)
    assert extract_as_ranks(images, tmp_path / "cut", 2)[0]["status"] == "written"
    assert digests(tmp_path / "cut") == digests(tmp_path / "one")


def test_all_ranks_stop_when_the_first_cannot_begin(images, tmp_path):  # noqa: F811
    (tmp_path / "thesis.txt").write_text("not ours")
    results = extract_as_ranks(images, tmp_path, 2)
    assert all("holds files smalto extract did not write" in text for text in results)


def test_a_world_without_an_address_is_explained(images, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun"):
        extract(images, tmp_path, crops="center")


WIDTH = 6


def features(folder, images):  # noqa: F811
    """Text of 1 to 9 tokens for every image; {split: [array]} in the order of the images."""
    meta, written = read_meta(images, IMAGES), {}
    rng = np.random.default_rng(0)
    for split in meta["splits"]:
        (folder / split).mkdir(parents=True)
        written[split] = []
        for number, key in enumerate(ImageReader(images, meta, split).keys()):
            text = rng.standard_normal((int(rng.integers(1, 10)), WIDTH)).astype(np.float32)
            np.save(folder / split / f"{key}.npy", text[None] if number % 2 else text)
            written[split].append(text.astype(np.float16))
    return written


def test_text_features_go_with_the_codes(images, tmp_path):  # noqa: F811
    written = features(tmp_path / "text", images)
    extract(images, tmp_path / "codes", crops="center_flip", text=tmp_path / "text")
    meta = read_meta(tmp_path / "codes", CODES)
    assert meta["text"] == {"path": str(tmp_path / "text"), "dim": WIDTH}
    names = [member.name for member in tar_members(tmp_path / "codes" / "train-00000.tar")]
    assert names[:4] == ["000000.codes.npy", "000000.label.npy", "000000.text.npy", "000000.text_length.npy"]
    data = codes_of(tmp_path / "codes", condition="text", text_tokens=5)
    plain = codes_of(tmp_path / "codes")
    for fetch, split in (("fetch_train", "train"), ("fetch_val", "val")):
        order = np.random.default_rng(1).permutation(len(written[split]))
        batch = getattr(data, fetch)(0, order)
        assert batch.keys() == {"codes", "text", "text_mask"}
        assert torch.equal(batch["codes"], getattr(plain, fetch)(0, order)["codes"])
        assert (batch["text"].dtype, batch["text"].shape[1:]) == (torch.float32, (5, WIDTH))
        for row, index in enumerate(order):
            expected = written[split][index][:5]
            valid = batch["text_mask"][row]
            assert valid.tolist() == [False] * (5 - len(expected)) + [True] * len(expected)
            assert np.array_equal(batch["text"][row][valid], expected)
            assert not batch["text"][row][~valid].any()


def test_text_that_is_missing_or_wrong_is_explained(images, tmp_path):  # noqa: F811
    features(tmp_path / "text", images)
    extract(images, tmp_path / "plain", crops="center")
    with pytest.raises(ValueError, match=r"holds no text features.*text=FOLDER"):
        codes_of(tmp_path / "plain", condition="text", text_tokens=5)
    with pytest.raises(ValueError, match="text_tokens"):
        codes_of(tmp_path / "plain", condition="text")
    with pytest.raises(ValueError, match="text_tokens"):
        codes_of(tmp_path / "plain", text_tokens=5)
    victim = next((tmp_path / "text" / "train").iterdir())
    np.save(victim, np.full((2, WIDTH), 1e6, np.float32))
    with pytest.raises(ValueError, match="float16 cannot"):
        extract(images, tmp_path / "a", crops="center", text=tmp_path / "text")
    np.save(victim, np.zeros((2, WIDTH + 1), np.float32))
    with pytest.raises(ValueError, match=r"must be \(tokens, "):
        extract(images, tmp_path / "b", crops="center", text=tmp_path / "text")
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=str(victim)):
        extract(images, tmp_path / "c", crops="center", text=tmp_path / "text")
    assert not (tmp_path / "c" / "meta.json").exists()


def npy_files(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.npy")}


@pytest.mark.parametrize(
    ("options", "suffixes"),
    [
        ({"crops": "ten", "crop_range": [1.1, 1.25]}, ["_flip_ten_crop", "_flip_ten_crop_125"]),
        ({"crops": "ten", "crop_range": [1.1, 1.0625]}, ["_flip_ten_crop", "_flip_ten_crop_106"]),
        ({"crops": "center_flip"}, ["_flip"]),
        ({"crops": "center"}, [""]),
    ],
)
def test_the_authors_layout(images, tmp_path, options, suffixes):  # noqa: F811
    extract(images, tmp_path / "codes", **options)
    meta, data = read_meta(tmp_path / "codes", CODES), codes_of(tmp_path / "codes")
    folders = export_npy(tmp_path / "codes", tmp_path / "npy")
    assert [f.name for f in folders] == [f"npy{v}{s}" for v in ("", "_val") for s in suffixes]
    crops = len(meta["crops"]) // len(suffixes)
    for number, folder in enumerate(folders[: len(suffixes)]):
        for index in (0, data.num_train - 1):
            codes = np.load(folder / f"imagenet{SIZE}_codes" / f"{index}.npy")
            assert (codes.dtype, codes.shape) == (np.int64, (1, crops, GRID * GRID))
            stored = data._readers["train"].gather(np.full(crops, index), np.arange(crops) + number * crops)
            assert np.array_equal(codes[0], stored)
            label = np.load(folder / f"imagenet{SIZE}_labels" / f"{index}.npy")
            assert (label.dtype, label.tolist()) == (np.int64, [data._readers["train"].labels[index]])
    with pytest.raises(FileExistsError, match="to_npy"):
        export_npy(tmp_path / "codes", tmp_path / "npy")


def imported(source, out, **changes):
    return import_codes(Stub(**changes), source, out=out, block_size=7, shard_size=20, overwrite=False)


def test_there_and_back_is_the_same(images, tmp_path):  # noqa: F811
    extract(images, tmp_path / "codes", crop_range=[1.1])
    train, val = export_npy(tmp_path / "codes", tmp_path / "npy")
    assert imported({"train": train, "val": val}, tmp_path / "back")["status"] == "written"
    assert digests(tmp_path / "back") == digests(tmp_path / "codes")
    old, new = read_meta(tmp_path / "codes", CODES), read_meta(tmp_path / "back", CODES)
    assert {k for k in old if k != "tf32" and old[k] != new[k]} == {"images", "classes"}  # who imports cannot know
    assert imported({"train": train, "val": val}, tmp_path / "back")["status"] == "reused"
    again = export_npy(tmp_path / "back", tmp_path / "again")
    assert [npy_files(folder) for folder in again] == [npy_files(train), npy_files(val)]


def test_an_export_that_was_interrupted_leaves_nothing_that_a_later_one_takes(images, tmp_path, monkeypatch):  # noqa: F811
    extract(images, tmp_path / "codes", crop_range=[1.1])
    ours = tmp_path / "npy_flip_ten_crop.0123abcd.tmp" / f"imagenet{SIZE}_codes"  # killed: of a larger set
    ours.mkdir(parents=True)
    np.save(ours / "100000.npy", np.zeros(1))
    (tmp_path / "npy_flip_ten_crop.tmp").mkdir()  # not a name that we give
    (tmp_path / "npy_val_flip_ten_crop").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="npy_val_flip_ten_crop exists already"):
        export_npy(tmp_path / "codes", tmp_path / "npy")
    assert {path.name for path in tmp_path.iterdir()} == before, "refused before anything is written"
    (tmp_path / "npy_val_flip_ten_crop").rmdir()
    real, calls = np.save, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2 * 45:  # in the validation images
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space"):
            export_npy(tmp_path / "codes", tmp_path / "npy")
    assert {path.name for path in tmp_path.iterdir()} == {"codes", "npy_flip_ten_crop.tmp"}
    train = export_npy(tmp_path / "codes", tmp_path / "npy")[0]
    assert len(list(train.rglob("*.npy"))) == 2 * codes_of(tmp_path / "codes").num_train
    with FileLock(tmp_path / "other.lock"), pytest.raises(FileExistsError, match="in use"):
        export_npy(tmp_path / "codes", tmp_path / "other")


def authors_files(folder, count, crops, *, codes=lambda i, c: np.full(GRID * GRID, i + c)):
    for kind in ("codes", "labels"):
        (folder / f"imagenet{SIZE}_{kind}").mkdir(parents=True)
    for i in range(count):
        array = np.stack([codes(i, c) for c in range(crops)])[None].astype(np.int64)
        np.save(folder / f"imagenet{SIZE}_codes" / f"{i}.npy", array)
        np.save(folder / f"imagenet{SIZE}_labels" / f"{i}.npy", np.array([i % 4]))


def test_both_ranges_of_the_authors_are_one_set(tmp_path):
    authors_files(tmp_path / "c2i_flip_ten_crop", 12, 10)
    authors_files(tmp_path / "c2i_flip_ten_crop_105", 12, 10, codes=lambda i, c: np.full(GRID * GRID, 30 + i + c))
    summary = imported({"train": tmp_path / "c2i_flip_ten_crop"}, tmp_path / "out")
    assert summary["crops"][:1] + summary["crops"][10:11] == ["top_left@1.1", "top_left@1.05"]
    data = codes_of(tmp_path / "out", crops="center")
    assert (data.num_train, data.num_val, data.num_classes) == (12, 0, 4)
    drawn = {int(c[0]) for e in range(20) for c in data.fetch_train(e, np.array([5]))["codes"]}
    assert drawn == {5 + 4, 30 + 5 + 4}
    only = imported({"train": tmp_path / "c2i_flip_ten_crop_105"}, tmp_path / "only")
    assert only["crops"][0] == "top_left"
    assert read_meta(tmp_path / "only", CODES)["crop_range"] == [1.05]


def test_code_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one folder \*_codes and one \*_labels"):
        imported({"train": tmp_path}, tmp_path / "o")
    authors_files(tmp_path / "in", 3, 2)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 16\), must be \(1, 2, 25\)"):
        imported({"train": tmp_path / "in"}, tmp_path / "o", code_shape=((5, 5),))
    with pytest.raises(ValueError, match=r"image 1 in .* codes from 1 to 2, the tokenizer's codebook has 2"):
        imported({"train": tmp_path / "in"}, tmp_path / "p", codebook_size=2)
    (tmp_path / "in" / f"imagenet{SIZE}_labels" / "2.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"2.npy is missing"):
        imported({"train": tmp_path / "in"}, tmp_path / "q")
    with pytest.raises(ValueError, match="from_npy has test"):
        imported({"test": tmp_path / "in"}, tmp_path / "r")


def test_the_command_exports_without_a_tokenizer(images, tmp_path):  # noqa: F811
    from smalto.extract import run
    from smalto.runtime import compose

    extract(images, tmp_path / "codes", crops="center")
    config = compose("extract", [f"out={tmp_path}/codes", f"to_npy={tmp_path}/npy"])
    assert OmegaConf.is_missing(config, "tokenizer_ckpt")
    assert run(config)["npy"] == [f"{tmp_path}/npy", f"{tmp_path}/npy_val"]
    assert int(np.load(tmp_path / "npy" / f"imagenet{SIZE}_codes" / "0.npy").max()) < CODEBOOK
