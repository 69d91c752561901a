import gzip
import io
import json
import pickle
import struct

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalto.data.source_cifar import CIFAR10_CLASSES, Cifar10
from smalto.data.source_idx import FashionMnist, Idx
from smalto.data.source_parquet import Parquet
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder
from smalto.data.write import TarShard
from smalto.files import write_json


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def value(record) -> int:
    image = Image.open(io.BytesIO(record.image)) if isinstance(record.image, bytes) else record.image
    return np.asarray(image).flat[0]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def facts(source):
    return [(r.name, r.label, r.caption, r.split) for r in source]


def agrees_with_itself(source):
    assert len(source) == len(list(source))
    for index, record in enumerate(source):
        assert source.name(index) == record.name
        assert source.split(index) == record.split
    assert len({r.name for r in source}) == len(source)
    assert sorted(source.order(np.random.default_rng(0))) == list(range(len(source)))


def test_embedded_fashion_mnist():
    source = FashionMnist()
    assert len(source) == 10_000
    assert len(source.classes) == 10
    labels = [source._parts[0][3][i] for i in range(10_000)]
    assert np.bincount(labels).tolist() == [1000] * 10
    assert source[0].label == 9  # the first test image is an ankle boot
    assert source[0].image.size == (28, 28)
    assert source.split(0) is None


def test_full_fashion_mnist_needs_its_files(tmp_path):
    with pytest.raises(ValueError, match="embedded"):
        FashionMnist(path=tmp_path)
    with pytest.raises(ValueError, match="t10k"):
        FashionMnist(subset="all")
    with pytest.raises(FileNotFoundError, match=r"source.download=true"):
        len(FashionMnist(subset="full", path=tmp_path))
    for name, count in (("train", 3), ("t10k", 2)):
        images = idx(np.full((count, 28, 28), count, np.uint8))
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    source = FashionMnist(subset="full", path=tmp_path)
    assert [r.split for r in source] == ["train"] * 3 + ["test"] * 2
    agrees_with_itself(source)


def test_idx_files(tmp_path):
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    (tmp_path / "i").write_bytes(idx(images))
    (tmp_path / "l.gz").write_bytes(gzip.compress(idx(np.array([4, 1], np.uint8))))
    source = Idx(images=tmp_path / "i", labels=tmp_path / "l.gz")
    assert facts(source) == [("images/000000", 4, None, None), ("images/000001", 1, None, None)]
    assert np.array_equal(np.asarray(source[1].image), images[1])
    both = Idx(
        images=tmp_path / "i",
        labels=tmp_path / "l.gz",
        val_images=tmp_path / "i",
        val_labels=tmp_path / "l.gz",
    )
    assert [r.split for r in both] == ["train", "train", "val", "val"]
    agrees_with_itself(both)


@pytest.mark.parametrize("data", [b"", b"hello there", b"\x1f\x8bjunk", idx(np.zeros((2, 3), np.uint8))[:-1]])
def test_damaged_idx_files_are_named(tmp_path, data):
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad is not a whole IDX file"):
        len(Idx(images=tmp_path / "bad", labels=tmp_path / "bad"))


def test_idx_images_and_labels_must_match(tmp_path):
    (tmp_path / "i").write_bytes(idx(np.zeros((2, 3, 3), np.uint8)))
    (tmp_path / "l").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(ValueError, match="expected"):
        len(Idx(images=tmp_path / "i", labels=tmp_path / "l"))
    with pytest.raises(ValueError, match="belong together"):
        Idx(images="i", labels="l", val_images="v")


def test_folder_with_classes_as_subfolders(tmp_path):
    for name in ("dog/a.png", "cat/b.PNG", "cat/deep/c.jpg", "cat/.hidden.png", "cat/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    source = Folder(path=tmp_path)
    assert source.classes == ["cat", "dog"]
    assert facts(source) == [
        ("cat/b.PNG", 0, None, None),
        ("cat/deep/c.jpg", 0, None, None),
        ("dog/a.png", 1, None, None),
    ]
    agrees_with_itself(source)
    with pytest.raises(ValueError, match="'dog'"):
        Folder(path=tmp_path, classes=["cat"])[2]


def test_folder_with_splits_and_without_classes(tmp_path):
    for name in ("train/x/a.png", "val/x/b.png", "val/y/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(7))
    source = Folder(path=tmp_path)
    assert [(r.label, r.split) for r in source] == [(0, "train"), (0, "val"), (1, "val")]
    flat = Folder(path=tmp_path / "val" / "x")
    assert facts(flat) == [("b.png", None, None, None)]
    assert flat.classes == []


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_folder_with_a_table(tmp_path, suffix):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    rows = [
        {"path": "2.png", "label": "fox", "caption": "a fox, red", "split": "val"},
        {"path": "0.png", "label": "ant", "caption": "", "split": "train"},
    ]
    text = (
        "".join(json.dumps(row) + "\n" for row in rows)
        if suffix == "jsonl"
        else 'path,label,caption,split\n2.png,fox,"a fox, red",val\n0.png,ant,,train\n'
    )
    (tmp_path / f"table.{suffix}").write_text(text)
    source = Folder(path=tmp_path, metadata=f"table.{suffix}")
    assert source.classes == ["ant", "fox"]
    assert facts(source) == [("2.png", 1, "a fox, red", "val"), ("0.png", 0, None, "train")]
    assert [value(r) for r in source] == [2, 0]
    agrees_with_itself(source)


def test_table_labels_that_are_numbers_stay(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("path,label\n0.png,7\n")
    source = Folder(path=tmp_path, metadata="t.csv")
    assert source[0].label == 7
    assert source.classes == []


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"source.path"):
        len(Folder(path=tmp_path / "no"))
    with pytest.raises(FileNotFoundError, match="no images"):
        len(Folder(path=tmp_path))
    with pytest.raises(FileNotFoundError, match="no table"):
        len(Folder(path=tmp_path, metadata="t.csv"))
    (tmp_path / "t.csv").write_text("file,label\na.png,7\n")
    with pytest.raises(ValueError, match="without path"):
        len(Folder(path=tmp_path, metadata="t.csv"))


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet(tmp_path, as_struct):
    images = [png(n) for n in range(10)]
    table = pa.table(
        {
            "image": [{"bytes": i, "path": None} for i in images] if as_struct else images,
            "label": [n % 3 for n in range(10)],
            "name": [("ant", "bee", "cow")[n % 3] for n in range(10)],
            "text": [f"picture {n}" for n in range(10)],
            "part": ["train"] * 8 + ["test"] * 2,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = Parquet(
        path=tmp_path / "a.parquet",
        caption_column="text",
        split_column="part",
        class_name_column="name",
        window=2,
    )
    assert source.classes == ["ant", "bee", "cow"]
    assert facts(source)[9] == ("a.parquet/00000009", 0, "picture 9", "test")
    assert [value(r) for r in source] == list(range(10))
    agrees_with_itself(source)


def test_parquet_folder_takes_splits_from_names_and_classes_from_the_schema(tmp_path):
    note = {"info": {"features": {"label": {"names": ["ant", "bee"]}}}}
    for name in ("train-0", "train-1", "validation-0"):
        table = pa.table({"image": [png(1)] * 3, "label": [0, 1, 1]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(note)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = Parquet(path=tmp_path)
    assert source.classes == ["ant", "bee"]
    assert [r.split for r in source] == ["train"] * 6 + ["val"] * 3
    assert source.name(7) == "validation-0.parquet/00000001"
    agrees_with_itself(source)


def test_parquet_order_stays_inside_windows(tmp_path):
    table = pa.table({"image": [png(1)] * 40, "label": range(40)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    order = Parquet(path=tmp_path / "a.parquet", window=2).order(np.random.default_rng(0))
    for start in range(0, 40, 8):
        assert len(set(order[start : start + 8] // 4)) == 2  # of two row groups at a time
    assert not np.array_equal(order, np.sort(order))


def test_parquet_says_which_columns_there_are(tmp_path):
    pq.write_table(pa.table({"img": [png(1)]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column image, label; it has img"):
        len(Parquet(path=tmp_path / "a.parquet"))
    source = Parquet(path=tmp_path / "a.parquet", image_column="img", label_column=None)
    assert facts(source) == [("a.parquet/00000000", None, None, None)]


def test_tar_of_others(tmp_path):
    with TarShard(tmp_path / "x-000.tar") as shard:
        shard.add("d/k1.jpg", png(1))
        shard.add("d/k1.cls", b"5\n")
        shard.add("d/k2.png", png(2))
        shard.add("d/k2.json", json.dumps({"label": 3, "caption": "two"}).encode())
        shard.add("d/k3.txt", b"no picture")
        shard.close()
    source = Tar(path=tmp_path / "x-{000..000}.tar")
    assert facts(source) == [("x-000.tar/d/k1", 5, None, None), ("x-000.tar/d/k2", 3, "two", None)]
    assert [value(r) for r in source] == [1, 2]
    agrees_with_itself(source)


def test_tar_of_our_own_keeps_split_and_classes(tmp_path):
    for split in ("train", "val"):
        with TarShard(tmp_path / f"{split}-00000.tar") as shard:
            shard.add("00000000.png", png(1))
            shard.add("00000000.cls", b"1")
            shard.close()
    write_json(tmp_path / "meta.json", {"classes": ["ant", "bee"]})
    source = Tar(path=tmp_path)
    assert source.classes == ["ant", "bee"]
    assert [r.split for r in source] == ["train", "val"]


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("binary", [False, True])
def test_cifar10(tmp_path, binary):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 2, 3072), dtype=np.uint8)
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        labels = [number, 9]
        if binary:
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels[number]], 1)
            (tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            batch = {b"data": pixels[number], b"labels": labels, b"filenames": [b"a", b"b"]}
            (tmp_path / name).write_bytes(pickle.dumps(batch, protocol=2))
    source = Cifar10(path=tmp_path)
    assert len(source) == 12
    assert source.classes == list(CIFAR10_CLASSES)
    assert facts(source)[0] == ("data_batch_1/000000", 0, None, "train")
    assert facts(source)[-1] == ("test_batch/000001", 9, None, "test")
    assert np.array_equal(np.asarray(source[0].image).transpose(2, 0, 1).ravel(), pixels[0, 0])
    agrees_with_itself(source)


def test_cifar10_pickles_cannot_run_code(tmp_path, capsys):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(ValueError, match=r"print"):
        len(Cifar10(path=tmp_path))
    assert "code ran" not in capsys.readouterr().out


def test_cifar10_errors(tmp_path):
    with pytest.raises(ValueError, match=r"source.path"):
        Cifar10()
    with pytest.raises(FileNotFoundError, match="data_batch_1"):
        len(Cifar10(path=tmp_path))
    (tmp_path / "data_batch_1.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3,073"):
        len(Cifar10(path=tmp_path))
