"""Labels, captions and splits as tables, files and tars of others have them."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from smalto.data.annotations import class_order, leading_split, read_caption, read_labels
from smalto.data.source_idx import Idx
from smalto.data.source_parquet import Parquet
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder
from smalto.data.splits import plan_splits
from smalto.data.write import TarShard

BUFFER = io.BytesIO()
Image.new("RGB", (4, 4)).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


def table(folder, rows, *, name="t.csv", header="path,label"):
    (folder / "a.png").write_bytes(PNG)
    text = f"{header}\n" + "".join(f"a.png,{row}\n" for row in rows)
    (folder / name).write_text(text)
    return Folder(path=folder, metadata=name)


def parquet(folder, labels, **options):
    pq.write_table(pa.table({"image": [PNG] * len(labels), "label": labels}), folder / "x.parquet")
    return Parquet(path=folder / "x.parquet", **options)


def tar(folder, labels, *, suffix="cls"):
    with TarShard(folder / "x-0.tar") as shard:
        for n, label in enumerate(labels):
            shard.add(f"{n:04d}.png", PNG)
            shard.add(f"{n:04d}.{suffix}", str(label).encode())
        shard.close()
    return Tar(path=folder / "x-0.tar")


def taken(source):
    return [source[i].label for i in range(len(source))]


@pytest.mark.parametrize("make", [table, tar, parquet])
@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (["0", "cat", "dog", "1"], ["0", "1", "cat", "dog"], [0, 2, 3, 1]),  # one name makes all of them names
        (["1.0", "2.0", "10.0"], [], [1, 2, 10]),
        (["3", "0", "11"], [], [3, 0, 11]),
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
    ],
)
def test_a_column_of_labels_is_decided_as_a_whole(tmp_path, make, labels, classes, numbers):
    source = make(tmp_path, labels)
    assert source.classes == classes
    assert taken(source) == numbers
    source.check()


@pytest.mark.parametrize("make", [table, tar, parquet])
@pytest.mark.parametrize("bad", ["-1", "0.5", "nan", "99999999999999999999", "1e400"])
def test_numbers_that_are_no_class_are_refused_with_their_row(tmp_path, make, bad):
    source = make(tmp_path, ["0", "1", bad])
    where = {"table": "t.csv, line 4", "tar": "0002", "parquet": "00000002"}[make.__name__]
    with pytest.raises(ValueError, match=rf"{where}.*the label"):
        source.check()


def test_nothing_is_asked_of_a_split_that_is_left_out(tmp_path):
    """Public test splits have -1 for labels, ImageNet's has no class folders."""
    rows = ["train,0", "val,1", "test,-1", "test,"]
    source = table(tmp_path, rows, header="path,split,label")
    plan = plan_splits(source, "auto", 0.1, None, None)
    source.check(np.concatenate(list(plan.values())))
    assert [source[i].label for i in (0, 1, 3)] == [0, 1, None]
    for refuse in (source.check, lambda: source[2]):
        with pytest.raises(ValueError, match="label"):
            refuse()


@pytest.mark.parametrize("column", [[1, 2, None], [1.0, 2.0, None]])
def test_parquet_numbers_beside_gaps(tmp_path, column):
    source = parquet(tmp_path, column)
    assert taken(source) == [1, 2, None]
    with pytest.raises(ValueError, match=r"1 of 3 images have no label \(x.parquet/00000002\)"):
        source.check()


def test_a_value_that_is_no_single_label_is_named(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"path": "a.png", "label": [1, 2]}) + "\n")
    with pytest.raises(ValueError, match=r"t.jsonl, line 1: the label is \[1, 2\]"):
        len(Folder(path=tmp_path, metadata="t.jsonl"))
    assert read_labels([True, False, None], str) == [1, 0, None]


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    for name in ("0", "1", "2", "10", "11"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PNG)
    source = Folder(path=tmp_path)
    assert source.classes == ["0", "1", "2", "10", "11"]
    assert [source.classes[label] for label in taken(source)] == [source.name(i).split("/")[0] for i in range(5)]
    assert class_order({"b", "10", "9"}) == ["10", "9", "b"]
    assert class_order({"01", "1", "02"}) == ["01", "1", "02"]


def test_labels_beyond_the_named_classes_are_told_before_any_image_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"a label is 2 but the source names 2 classes"):
        parquet(tmp_path, [0, 1, 2], classes=["a", "b"]).check()
    header = b"\0\0\x08"
    (tmp_path / "i").write_bytes(header + b"\3" + np.array([2, 1, 1], ">u4").tobytes() + b"\0\0")
    (tmp_path / "l").write_bytes(header + b"\1" + np.array([2], ">u4").tobytes() + b"\0\7")
    with pytest.raises(ValueError, match=r"images/000001 has the label 7; .* 2 classes"):
        Idx(images=tmp_path / "i", labels=tmp_path / "l", classes=["a", "b"]).check()


def test_names_that_yaml_took_for_something_else(tmp_path):
    with pytest.raises(ValueError, match=r"source.classes has None, .* quotes"):
        Folder(path=tmp_path, classes=["no", None])


def test_a_name_of_two_classes_says_nothing(tmp_path):
    with pytest.raises(ValueError, match="class 'crane'"):
        taken(parquet(tmp_path, ["crane", "dog"], classes=["crane", "dog", "crane"]))


def test_class_names_beside_numbers_must_agree(tmp_path):
    data = {"image": [PNG] * 3, "label": [0, 1, 1], "name": ["a", "b", "c"]}
    pq.write_table(pa.table(data), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"00000002: class 1 is 'c' here and 'b' before"):
        Parquet(path=tmp_path / "x.parquet", class_name_column="name").check()


WORDS = {
    "train": "train",
    "Train": "train",
    "TRAINING": "train",
    "val": "val",
    "dev": "val",
    "Valid": "val",
    "eval": "val",
}


@pytest.mark.parametrize("make", ["table", "parquet"])
def test_split_words_in_any_case(tmp_path, make):
    words = list(WORDS) + ["test", "Testing"]
    if make == "table":
        source = table(tmp_path, words, header="path,split")
    else:
        pq.write_table(pa.table({"image": [PNG] * len(words), "s": words}), tmp_path / "x.parquet")
        source = Parquet(path=tmp_path / "x.parquet", label_column=None, split_column="s")
    plan = plan_splits(source, "auto", 0.1, None, None)
    assert [words[i] for i in plan["train"]] == ["train", "Train", "TRAINING"]
    assert [words[i] for i in plan["val"]] == ["val", "dev", "Valid", "eval"]


@pytest.mark.parametrize("blank", ["", "  "])
def test_one_blank_cell_does_not_redraw_the_split(tmp_path, blank):
    source = table(
        tmp_path, [f"{w},{n}" for n, w in enumerate(["train", "train", blank, "test"])], header="path,split,caption"
    )
    for split in ("auto", "source"):
        with pytest.raises(ValueError, match=r"a.png belongs to no split \(1 of 4"):
            plan_splits(source, split, 0.5, None, None)
    assert sum(map(len, plan_splits(source, "hash", 0.5, None, None).values())) == 4


@pytest.mark.parametrize("words", [["train", "extra"], ["0", "1"]])
def test_words_that_are_no_split_are_named(tmp_path, words):
    with pytest.raises(ValueError, match=rf"'{words[-1]}'.*: no split is called so"):
        plan_splits(table(tmp_path, words, header="path,split"), "auto", 0.1, None, None)


def test_a_shard_without_a_split_among_shards_with_one_is_named(tmp_path):
    for name in ("train-0", "test-0", "more-0"):
        with TarShard(tmp_path / f"{name}.tar") as shard:
            shard.add("a.png", PNG)
            shard.close()
    with pytest.raises(ValueError, match=r"more-0.tar/a belongs to no split"):
        plan_splits(Tar(path=tmp_path), "auto", 0.1, None, None)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00.tar", "train"),
        ("Training_1.tar", "train"),
        ("val2017.tar", "val"),
        ("validation-0-of-3.parquet", "val"),
        ("dev.tar", "val"),
        ("test.tar", "test"),
        ("valley-0.tar", None),
        ("trains.tar", None),
        ("images.tar", None),
    ],
)
def test_splits_at_the_start_of_file_names_are_whole_words(tmp_path, name, split):
    assert leading_split(tmp_path / name) == split


@pytest.mark.parametrize(
    ("value", "caption"), [("one", "one"), (["one", "two"], "one"), (7, "7"), (None, None), ("", None), (0.5, "0.5")]
)
def test_captions(value, caption):
    assert read_caption(value, lambda: "here")[0] == caption


@pytest.mark.parametrize("value", [{"a": 1}, [], [1], True, ["one", None], "\ud800"])
def test_what_is_no_caption_is_refused_by_place(value):
    with pytest.raises(ValueError, match=r"^here: the caption"):
        read_caption(value, lambda: "here")


@pytest.mark.parametrize("make", ["jsonl", "tar", "parquet"])
def test_of_several_captions_the_first_is_taken_and_that_is_said(tmp_path, make, caplog):
    captions = [["one", "two"], ["three"]]
    if make == "jsonl":
        (tmp_path / "a.png").write_bytes(PNG)
        lines = [json.dumps({"path": "a.png", "caption": caption}) + "\n" for caption in captions]
        (tmp_path / "t.jsonl").write_text("".join(lines))
        source = Folder(path=tmp_path, metadata="t.jsonl")
    elif make == "tar":
        source = tar(tmp_path, [json.dumps({"caption": caption}) for caption in captions], suffix="json")
    else:
        data = {"image": [PNG] * 2, "c": captions}
        pq.write_table(pa.table(data), tmp_path / "x.parquet")
        source = Parquet(path=tmp_path / "x.parquet", label_column=None, caption_column="c")
    assert [record.caption for record in source] == ["one", "three"]
    assert "1 images have several captions" in caplog.text if make == "jsonl" else sum(source.skipped.values()) == 1
