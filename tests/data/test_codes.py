import io
import json
import tarfile
import zlib

import numpy as np
import pytest
import torch

from smalto.data.codes import CodeReader, CodeShards, add_code_block, add_row_sums, code_dtype
from smalto.data.row_sums import have_sums, row_sums
from smalto.data.shards import tar_members
from smalto.data.transforms import TEN_CROPS
from smalto.data.write import TarShard, npy_bytes
from smalto.errors import InputError
from smalto.files import write_json

TOKENS, CODEBOOK = 6, 50
SHAPE = [[2, 3]]


def stored_codes(split: str, count: int, crops: int) -> np.ndarray:
    rng = np.random.default_rng(len(split))
    return rng.integers(0, CODEBOOK, (count, crops, TOKENS)).astype(np.uint16)


def code_shards(folder, *, crops=TEN_CROPS, counts=(50, 12), dtype=np.uint16, block=8, blocks_per_shard=3, sums=True):
    splits = {}
    for split, count in zip(("train", "val"), counts, strict=True):
        codes, labels = stored_codes(split, count, len(crops)).astype(dtype), np.arange(count) % 5
        shards, size = [], block * blocks_per_shard
        for number, first in enumerate(range(0, count, size)):
            with TarShard(folder / f"{split}-{number:05d}.tar") as shard:
                last, blocks = min(first + size, count), []
                for start in range(first, last, block):
                    stop = min(start + block, last)
                    blocks.append(add_code_block(shard, start // block, codes[start:stop], labels[start:stop]))
                if sums:
                    add_row_sums(shard, blocks)
                shards.append(shard.close() | {"num_images": last - first})
        splits[split] = {"num_images": count, "shards": shards}
    meta = {
        "format": "smalto-codes",
        "version": 1,
        "splits": splits,
        "num_classes": 5,
        "classes": [],
        "codebook_size": CODEBOOK,
        "code_shape": SHAPE,
        "crops": list(crops),
        "tokenizer": {"path": "tokenizer.ckpt", "fingerprint": "0123456789abcdef"},
        "dtype": np.dtype(dtype).name,
    }
    write_json(folder / "meta.json", meta)
    return meta


def module(path, **changes):
    options = {
        "path": path,
        "batch_size": 10,
        "seed": 0,
        "codebook_size": CODEBOOK,
        "code_shape": SHAPE,
        "crops": "all",
    }
    data = CodeShards(**(options | changes))
    data.setup()
    return data


@pytest.mark.parametrize(("size", "dtype"), [(2, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_smallest_type_that_holds_the_codebook(size, dtype):
    assert code_dtype(size).__name__ == dtype


@pytest.mark.parametrize("size", [0, 2**32 + 1, 2**36])
def test_a_codebook_that_no_stored_type_holds_is_refused(size):
    assert np.iinfo(code_dtype(2**32)).max == 2**32 - 1
    with pytest.raises(ValueError, match=f"codebook_size is {size}"):
        code_dtype(size)


def test_labels_outside_the_classes_are_told_before_training(tmp_path):
    code_shards(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"num_classes": 4}))
    with pytest.raises(ValueError, match=r"10 labels of train in .* are outside 0 to 3, the first is 4 of image 4"):
        module(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_gather_equals_plain_indexing(tmp_path, dtype):
    reader = CodeReader(tmp_path, code_shards(tmp_path, dtype=dtype), "train")
    codes, rng = stored_codes("train", 50, 10), np.random.default_rng(0)
    indices, crops = rng.integers(0, 50, 200), rng.integers(0, 10, 200)
    found = reader.gather(indices, crops)
    assert found.dtype == np.int64
    assert np.array_equal(found, codes[indices, crops])
    assert np.array_equal(reader.labels, np.arange(50) % 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches(tmp_path, workers):
    code_shards(tmp_path)
    data = module(tmp_path, num_workers=workers)
    assert (data.num_train, data.num_val, data.num_classes) == (50, 12, 5)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    for batch in batches:
        assert batch["codes"].shape == (10, TOKENS)
        assert batch["codes"].dtype == batch["label"].dtype == torch.int64
    assert sorted(torch.cat([b["label"] for b in batches]).tolist()) == sorted(np.arange(50) % 5)


def test_training_sees_every_stored_crop_equally_often(tmp_path):
    code_shards(tmp_path)
    data, codes = module(tmp_path), stored_codes("train", 50, 10)
    counts = np.zeros(10)
    for epoch in range(60):
        batch = data.fetch_train(epoch, np.arange(50))["codes"].numpy()
        matches = (batch[:, None] == codes).all(2)
        assert matches.any(1).all()
        counts += matches.sum(0)
    # 3,000 draws over 10 crops: chi-square of 9 degrees, p < 1e-5 above 40
    assert ((counts - 300) ** 2 / 300).sum() < 40


def test_the_crop_is_a_function_of_seed_epoch_and_image(tmp_path):
    code_shards(tmp_path)
    batch = module(tmp_path).fetch_train(2, np.array([4, 31]))["codes"]
    assert torch.equal(module(tmp_path).fetch_train(2, np.array([31]))["codes"][0], batch[1])
    others = [module(tmp_path, seed=s).fetch_train(e, np.arange(50))["codes"] for s, e in [(0, 2), (0, 3), (1, 2)]]
    assert not torch.equal(others[0], others[1])
    assert not torch.equal(others[0], others[2])


@pytest.mark.parametrize(("crops", "numbers"), [("no_flip", range(5)), ("center", [4]), ("all", range(10))])
def test_crops_that_training_draws_from(tmp_path, crops, numbers):
    code_shards(tmp_path)
    data, codes = module(tmp_path, crops=crops), stored_codes("train", 50, 10)
    drawn = set()
    for epoch in range(5):
        batch = data.fetch_train(epoch, np.arange(50))["codes"].numpy()
        drawn |= set((batch[:, None] == codes).all(2).argmax(1))
    assert drawn == set(numbers)


@pytest.mark.parametrize("crops", ["all", "no_flip", "center"])
def test_validation_is_the_plain_centre(tmp_path, crops):
    code_shards(tmp_path)
    batches = list(module(tmp_path, crops=crops, val_batch_size=5).val_dataloader())
    assert [len(b["codes"]) for b in batches] == [5, 5, 2]
    assert np.array_equal(torch.cat([b["codes"] for b in batches]), stored_codes("val", 12, 10)[:, 4])


def test_several_crop_ranges(tmp_path):
    names = [f"{name}@{r}" for r in (1.1, 1.05) for name in TEN_CROPS]
    code_shards(tmp_path, crops=names)
    codes = stored_codes("train", 50, 20)
    batch = module(tmp_path, crops="center").fetch_train(0, np.arange(50))["codes"].numpy()
    assert set((batch[:, None] == codes).all(2).argmax(1)) == {4, 14}
    val = module(tmp_path).fetch_val(0, np.arange(12))["codes"]
    assert np.array_equal(val, stored_codes("val", 12, 20)[:, 4])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 64}, r"codebook_size 50, the model expects 64.*tokenizer.ckpt"),
        ({"code_shape": [[3, 3]]}, r"code_shape \[\[2, 3\]\], the model expects \[\[3, 3\]\]"),
        ({"tokenizer_fingerprint": "f" * 16}, r"weights 0123456789abcdef, the model expects ffff.*smalto extract"),
        ({"crops": "corner"}, "all, center or no_flip"),
    ],
)
def test_shards_of_another_tokenizer_are_refused(tmp_path, changes, words):
    code_shards(tmp_path)
    with pytest.raises(ValueError, match=words):
        module(tmp_path, **changes)


def test_a_matching_fingerprint_is_accepted(tmp_path):
    code_shards(tmp_path)
    assert module(tmp_path, tokenizer_fingerprint="0123456789abcdef", code_shape=((2, 3),)).num_train == 50


def test_validation_needs_a_centre(tmp_path):
    code_shards(tmp_path, crops=["top_left", "center_flip"])
    with pytest.raises(ValueError, match=r"no centre crop.*crops=ten"):
        module(tmp_path)


def test_blocks_that_contradict_meta_are_named(tmp_path):
    meta = code_shards(tmp_path)
    write_json(tmp_path / "meta.json", meta | {"crops": ["center"]})
    with pytest.raises(ValueError, match=r"000000.codes.npy in .* is uint16 \(8, 10, 6\)"):
        module(tmp_path)


def test_frequencies_and_histogram(tmp_path):
    code_shards(tmp_path)
    data = module(tmp_path)
    assert data.class_frequencies() == pytest.approx([0.2] * 5)
    expected = np.bincount(stored_codes("train", 50, 10)[:, 4].ravel(), minlength=CODEBOOK)
    assert np.array_equal(data.code_histogram(), expected)


def flip(folder, member: str, bit: int) -> None:
    """One bit of the content of a member of the second training shard."""
    shard = folder / "train-00001.tar"
    place = next(m.offset for m in tar_members(shard) if m.name == member)
    data = bytearray(shard.read_bytes())
    data[place + bit // 8] ^= 1 << bit % 8
    shard.write_bytes(data)


def read_all(path, **options) -> None:
    """Every row of ten crops, with near certainty."""
    data = module(path, **options)
    for epoch in range(60):
        assert data.fetch_train(epoch, np.arange(50))["codes"].shape == (50, TOKENS)


@pytest.mark.parametrize("member", ["000004.codes.npy", "000004.label.npy", "row_sums.npy"])
@pytest.mark.parametrize("sums", [True, False])
def test_a_flipped_bit_is_seen_where_it_is_read(tmp_path, member, sums):
    """In older shards, without checksums of rows, before the first batch."""
    if member == "row_sums.npy" and not sums:
        return
    code_shards(tmp_path, sums=sums)
    read_all(tmp_path)
    flip(tmp_path, member, 8 * 128)  # behind the .npy header
    with pytest.raises(InputError, match=r"(train-00001.tar is damaged|train-00001.tar has changed).*verify=false"):
        read_all(tmp_path)
    read_all(tmp_path, verify=False)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("shape", [(1, 6), (2, 7), (16, 4), (37, 12), (32, 256)])
def test_a_batch_is_verified_as_its_rows_are(dtype, shape):
    rng = np.random.default_rng(0)
    codes, labels = rng.integers(0, 2**16, shape).astype(dtype), rng.integers(-1, 1000, shape[0])
    rows, sums = codes.tobytes(), row_sums(codes.tobytes(), labels)
    assert have_sums(rows, labels, sums)
    assert sums[0] == zlib.crc32(codes[0].tobytes() + int(labels[0]).to_bytes(8, "little", signed=True))
    for bit in rng.integers(0, 8 * len(rows), 50):
        changed = bytearray(rows)
        changed[bit // 8] ^= 1 << bit % 8
        assert not have_sums(bytes(changed), labels, sums)
        assert (row_sums(bytes(changed), labels) != sums).sum() == 1
    labels[-1] += 1
    assert not have_sums(rows, labels, sums)


def test_shards_with_and_without_checksums_make_one_set(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, sums in ((old, False), (new, True)):
        folder.mkdir()
        meta = code_shards(folder, sums=sums)
        if not sums:
            older = meta["splits"]["train"]["shards"][0]
    (new / "train-00000.tar").write_bytes((old / "train-00000.tar").read_bytes())
    meta["splits"]["train"]["shards"][0] = older
    write_json(new / "meta.json", meta)
    reader = CodeReader(new, meta, "train")
    assert [shard["name"] for shard in reader.unverified] == ["train-00000.tar"]
    data = module(new)
    assert np.array_equal(data.fetch_val(0, np.arange(12))["codes"], stored_codes("val", 12, 10)[:, 4])
    read_all(new)
    flip(new, "000005.codes.npy", 8 * 200)
    with pytest.raises(InputError, match=r"train-00001.tar is damaged"):
        read_all(new)


def resident_mib() -> float:
    """Memory of this process that is not shared with others, and all of it."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) / 1024


def sparse_shards(folder, shards: int, images: int):
    """Shards of 256 tokens and 10 crops whose codes are a hole in the file: they take no room on the disk."""
    records, tokens = [], 256
    for number in range(shards):
        file = folder / f"train-{number:05d}.tar"
        codes = np.lib.format.header_data_from_array_1_0(np.zeros((0, 10, tokens), np.uint16)) | {
            "shape": (images, 10, tokens)
        }
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, codes)
        labels = npy_bytes(np.arange(images) % 5)
        with file.open("wb") as out:
            size = len(header.getvalue()) + images * 10 * tokens * 2
            for name, length, data in (
                ("000000.codes.npy", size, header.getvalue()),
                ("000000.label.npy", len(labels), labels),
            ):
                info = tarfile.TarInfo(name)
                info.size = length
                out.write(info.tobuf(tarfile.USTAR_FORMAT))
                start = out.tell()
                out.write(data)
                out.seek(start + -(-length // 512) * 512)
            out.truncate(out.tell() + 1024)
        records.append({"name": file.name, "num_images": images, "bytes": file.stat().st_size})
    meta = {"format": "smalto-codes", "version": 1, "num_classes": 5, "classes": [], "codebook_size": CODEBOOK}
    meta |= {"splits": {"train": {"num_images": shards * images, "shards": records}}, "code_shape": [[16, 16]]}
    meta |= {"crops": list(TEN_CROPS), "dtype": "uint16", "tokenizer": {"path": "x", "fingerprint": "y"}}
    write_json(folder / "meta.json", meta)


def test_memory_does_not_grow_with_the_set(tmp_path):
    grown = []
    for number, shards in enumerate((1, 100)):  # 100 MB and 10 GB
        (tmp_path / str(number)).mkdir()
        sparse_shards(tmp_path / str(number), shards, 20_000)
        total = sum(shard.stat().st_size for shard in (tmp_path / str(number)).iterdir())
        assert total > shards * 1e8
        before = resident_mib()
        data = module(tmp_path / str(number), batch_size=256, code_shape=[[16, 16]])
        batches = iter(data.train_dataloader())
        for _ in range(70):
            assert next(batches)["codes"].shape == (256, 256)
        grown.append(resident_mib() - before)
    # two million images: their order takes 8 bytes each, labels 4; the codes nothing
    assert grown[1] < 60, grown
