"""More of what other people's data has: splits by other names, tars that go on, lists that are none."""

import io
import logging
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalto.data.annotations import file_splits, given_names, read_labels
from smalto.data.encode import Recipe
from smalto.data.image_stream import ImageStream
from smalto.data.npz_images import open_npz_images
from smalto.data.patterns import expand_braces, expand_paths, scan_foreign
from smalto.data.pictures import read_picture_file
from smalto.data.reader import ImageReader
from smalto.data.source_cifar import Cifar10
from smalto.data.source_idx import read_idx
from smalto.data.source_parquet import Parquet
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder
from smalto.data.tar_members import tar_members
from smalto.data.tar_stream import read_samples
from smalto.errors import UserError
from tiny_pictures import png, put


def tar(path, members, form=tarfile.USTAR_FORMAT):
    """Members are names with bytes, or names with the name a symbolic link leads to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train2017/cat/a.png", "val2017/cat/b.png"], "train2017, val2017: splits by the words in them"),
        (["training_set/a.png", "test_set/b.png"], "test_set, training_set"),
        (["trainval/cat/a.png", "testset/cat/b.png"], "testset, trainval"),
        (["data/train/cat/a.png", "data/val/cat/b.png"], r"splits below data \(train, val\): set source.path"),
        (["cat/train/a.png", "cat/val/b.png", "dog/train/c.png", "dog/val/d.png"], "below cat .* below 1 more"),
    ],
)
def test_splits_that_would_be_classes_are_refused(tmp_path, names, told):
    with pytest.raises(UserError, match=told):
        len(Folder(path=put(tmp_path, *names)))
    assert len(Folder(path=tmp_path, layout="classes")) == len(names)


SPREAD = ["train/n1/images/a.png", "train/n2/images/b.png"]


@pytest.mark.parametrize("names", [["val/images/c.png"], ["val/n1/c.png", "test/images/d.png"]])
def test_a_folder_of_all_that_is_held_out_is_no_class(tmp_path, names):
    """Tiny-ImageNet keeps validation in val/images, and its classes in a text file."""
    with pytest.raises(UserError, match="in one folder, images, and no class for training"):
        print(Folder(path=put(tmp_path, *SPREAD, *names)).classes)


def test_classes_that_only_validation_has_are_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert Folder(path=put(tmp_path, *SPREAD, "val/n2/c.png", "val/n3/d.png")).classes == ["n1", "n2", "n3"]
    assert "classes of val that training lacks: n3" in caplog.text


def test_splits_below_a_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="splits below train"):
        len(Folder(path=put(tmp_path, "train/train/cat/a.png", "train/val/cat/b.png")))


@pytest.mark.parametrize(
    "names",
    [["train_station/a.png", "boat/b.png"], ["cat/train/a.png", "dog/b.png"], ["contest/a.png", "trainer/b.png"]],
)
def test_words_that_hold_nothing_out_are_classes(tmp_path, names):
    assert Folder(path=put(tmp_path, *names)).classes == sorted(name.split("/")[0] for name in names)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["imagenet1k-train-00.tar", "imagenet1k-validation-00.tar"], ["train", "val"]),
        (["train/0.tar", "test/0.tar"], ["train", "test"]),
        (["train-0.tar", "my-val-0.tar"], ["train", None]),  # refused by plan_splits
        (["a-train.tar", "b-train.tar"], [None, None]),
        (["valley-0.tar", "x.tar"], [None, None]),
    ],
)
def test_splits_of_files(tmp_path, names, splits):
    assert file_splits([tmp_path / name for name in names]) == splits


def test_sources_and_streams_keep_what_files_hold_out(tmp_path):
    for split in ("train", "validation"):
        tar(tmp_path / f"imagenet1k-{split}-0.tar", {"0.png": png()})
        (tmp_path / split).mkdir()
        pq.write_table(pa.table({"image": [png()]}), tmp_path / split / "0000.parquet")
    tars = Tar(path=tmp_path)
    table = Parquet(path=f"{tmp_path}/*/*.parquet", label_column=None)
    assert [tars.split(0), tars.split(1)] == [table.split(0), table.split(1)] == ["train", "val"]
    assert [len(split["shards"]) for split in scan_foreign(tmp_path)["splits"].values()] == [1, 1]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_put_one_after_the_other_are_refused(tmp_path, form):
    name = "x" * 90 + "é.png"
    first, second = (tar(tmp_path / n, {name: png(), "b.png": png()}, form) for n in ("a.tar", "b.tar"))
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    assert len(list(tar_members(first))) == 2
    with pytest.raises(UserError, match="more members behind its end mark"):
        list(tar_members(tmp_path / "both.tar"))
    assert len(list(read_samples(str(first)))) == 2
    with pytest.raises(UserError, match="more members behind its end mark"):
        list(read_samples(f"pipe:cat {first} {second}"))


def test_links_to_what_comes_later_count(tmp_path):
    path = tar(tmp_path / "a.tar", {"0.png": "x/1.png", "x/1.png": "../2.png", "2.png": png(), "3.png": "3.png"})
    source = Tar(path=path)
    assert [source.name(i) for i in range(len(source))] == ["a.tar/0", "a.tar/x/1", "a.tar/2"]
    assert source[0].image == source[2].image
    assert source.skipped == {"links to nothing in the tar": 1}


def test_members_and_shards_that_are_not_read_are_counted(tmp_path, caplog):
    tar(tmp_path / "a.tar", {"0.png": png(), "0.caption": b"x", "0.cls.txt": b"1"})
    (tmp_path / "b.tar.gz").write_bytes(b"")
    source = Tar(path=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert source.skipped == {"members .caption": 1, "members .cls.txt": 1, "compressed tars": 1}
    assert "b.tar.gz" in caplog.text


def test_text_with_a_byte_order_mark(tmp_path):
    mark = b"\xef\xbb\xbf"
    members = {"0.png": png(), "0.cls": mark + b"1", "1.png": png(), "1.json": mark + b'{"label": 0, "caption": "x"}'}
    source = Tar(path=tar(tmp_path / "a.tar", members))
    assert [(r.label, r.caption) for r in source] == [(1, None), (0, "x")]
    stream = ImageStream.__new__(ImageStream)
    stream._numbers, stream._num_classes = {}, None
    assert stream._label(mark + b"1") == 1
    shard = tar(tmp_path / "s" / "a.tar", {"0.png": png(), "0.cls": mark + b"1"})
    assert ImageReader(shard.parent, scan_foreign(shard), "train").labels.tolist() == [1]


@pytest.mark.parametrize("text", [struct.pack("<q", 5).decode(), "\ufeff1", "\ud800"])
def test_bytes_that_are_no_text_are_no_class(text):
    with pytest.raises(UserError, match=r"row 0: the label .* no text"):
        read_labels([text, "cat"], lambda i: f"row {i}")


@pytest.mark.parametrize("content", ['{"classes": "cat"}', '{"classes": {"0": "cat"}}', "[" * 100_000, "[]", "\0"])
def test_class_lists_beside_tars_that_are_none(tmp_path, content):
    tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": b"1"})
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(UserError, match=r"meta.json is not a smalto meta.json; set source.classes"):
        print(Tar(path=tmp_path).classes)


def test_names_beside_a_foreign_meta_json(tmp_path):
    tar(tmp_path / "a.tar", {"0.png": png(), "0.cls": b"dog"})
    (tmp_path / "meta.json").write_text('{"samples": 1}')
    assert Tar(path=tmp_path).classes == ["dog"]


@pytest.mark.parametrize("classes", ["cat", {"cat": 0}])
def test_classes_are_a_list(classes):
    with pytest.raises(UserError, match=r"source.classes is .* must be a list"):
        given_names(classes)


def test_patterns(tmp_path, monkeypatch):
    monkeypatch.setattr("smalto.data.patterns._MOST", 1000)
    put(tmp_path, "a-0.tar", "a-1.tar")
    assert [p.name for p in expand_paths(f"{tmp_path}/a-{{1..0}}.tar")] == ["a-1.tar", "a-0.tar"]
    assert [p.name for p in expand_paths(f"{tmp_path}/a-{{1,*}}.tar")] == ["a-1.tar", "a-0.tar"]
    for huge in ("{0..999999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError, match="stands for more than 1000 names"):
            expand_braces(huge)


def test_what_is_no_plain_file_is_refused_at_once(tmp_path):
    pipe, folder = tmp_path / "a.tar", tmp_path / "b.tar"
    os.mkfifo(pipe)
    folder.mkdir()
    for read in (lambda p: list(tar_members(p)), read_idx, read_picture_file, lambda p: len(Parquet(path=p))):
        with pytest.raises(UserError, match=r"a.tar is no plain file"):
            read(pipe)
        if read.__name__ != "<lambda>":
            with pytest.raises(UserError, match=r"b.tar is no plain file"):
                read(folder)


def test_labels_are_not_named_up_to_any_number(tmp_path):
    pq.write_table(
        pa.table({"image": [png()] * 2, "label": [0, 2**31 - 2], "name": ["a", "b"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match="names 2 classes, the highest label is 2147483646"):
        print(Parquet(path=tmp_path, class_name_column="name").classes)


@pytest.mark.parametrize("resize", ["pad", "center_crop", "short_side"])
def test_sides_beyond_any_picture(resize):
    with pytest.raises(UserError, match="image_size is 100000, must be at most 9459"):
        Recipe(resize, 100_000, "png", 1)


PIXELS = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        ({b"data": np.ascontiguousarray(PIXELS.T), b"labels": [0, 1]}, "shape"),
        ({b"data": PIXELS.reshape(2, 32, 32, 3), b"labels": [0, 1]}, "shape"),
        ({b"data": [[0.5] * 3072] * 2, b"labels": [0, 1]}, "float64"),
        ({b"data": [[256] * 3072] * 2, b"labels": [0, 1]}, r"not in \[0, 255\]"),
        ({b"data": PIXELS.astype(np.float32), b"labels": [0, 1]}, "its pixels are f4"),
        ({b"data": PIXELS, b"labels": [0.5, 1.7]}, "labels are no list of whole numbers"),
        ({b"data": PIXELS, b"labels": np.array([0, 1])}, "labels are no list of whole numbers"),
        ({b"data": PIXELS, b"labels": [0]}, "2 images and 1 labels"),
        ({b"data": PIXELS, b"fine_labels": [0, 1]}, "no dict with data and labels"),
    ],
)
def test_cifar_batches_of_another_form(tmp_path, batch, told):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(batch, 2))
    with pytest.raises(UserError, match=f"data_batch_1 is not a CIFAR-10 batch: .*{told}"):
        len(Cifar10(path=tmp_path))


@pytest.mark.parametrize("labels", [np.array([0, -1]), np.array([0, 2**40]), np.array([0.0, 1.0]), np.arange(3)])
def test_npz_labels_that_are_none_are_told(tmp_path, labels, caplog):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), labels=labels)
    with caplog.at_level(logging.WARNING):
        assert open_npz_images(tmp_path / "a.npz")[1] is None
    assert "labels" in caplog.text


def test_npz_messages_name_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.array([{}], object))
    with pytest.raises(UserError, match=r"a.npz: arr_0 cannot be read: it holds Python objects"):
        open_npz_images(Path(tmp_path / "a.npz"))
