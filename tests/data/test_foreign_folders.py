"""Folders and tables as other people's disks have them: what is taken, what is counted, what is refused."""

import json
import logging
import os

import numpy as np
import pytest
from PIL import Image

from smalto.data.encode import Recipe
from smalto.data.picture_sets import open_pictures
from smalto.data.sources import Folder
from smalto.prepare import prepare_images


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5)).save(folder / name, "PNG")
    return folder


def facts(source):
    return source.classes, [(r.name, r.label, r.split) for r in source]


def prepare(source, out, **changes):
    options = {
        "recipe": Recipe("keep", None, "png", 1),
        "split": "auto",
        "val_fraction": 0.0,
        "limit": None,
        "shuffle": False,
        "seed": 0,
        "shard_size": 7,
        "workers": 0,
        "max_rejected": 9,
        "overwrite": False,
        "description": {},
        "command": "",
    }
    return prepare_images(source, out=out, **(options | changes))


SYSTEM = [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".cache"]


@pytest.mark.parametrize("layout", [["cat/a.png", "dog/b.png"], ["train/cat/a.png", "val/dog/b.png"]])
def test_hidden_and_system_names_are_no_classes(tmp_path, layout):
    put(tmp_path / "clean", *layout)
    put(tmp_path / "real", *layout, *(f"{name}/x/s.png" for name in SYSTEM), "cat/.hidden.png")
    (tmp_path / "real" / "Thumbs.db").write_bytes(b"1")
    source = Folder(path=tmp_path / "real")
    assert facts(source) == facts(Folder(path=tmp_path / "clean"))
    assert source.skipped == {"hidden or system": len(SYSTEM) + 2}
    assert len(open_pictures(tmp_path / "real")) == 2


def test_splits_in_any_case(tmp_path):
    put(tmp_path, "Train/cat/a.png", "Test/cat/b.png", "VALIDATION/cat/c.png")
    source = Folder(path=tmp_path)
    assert source.classes == ["cat"]
    assert [record.split for record in source] == ["Test", "Train", "VALIDATION"]
    summary = prepare(source, tmp_path / "out")
    assert (summary["num_train"], summary["num_val"]) == (1, 1)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["train/cat/a.png", "val/cat/b.png", "unlabeled/c.png"], "the folder unlabeled"),
        (["train/cat/a.png", "val/cat/b.png", "devkit/c.png"], "the folder devkit"),
        (["train/cat/a.png", "val/cat/b.png", "c.png"], "c.png"),
        (["val/cat/a.png", "test/cat/b.png"], "no folder for training"),
    ],
)
def test_folders_that_may_be_splits_or_classes_are_refused_with_what_was_seen(tmp_path, names, told):
    source = Folder(path=put(tmp_path, *names))
    with pytest.raises(ValueError, match=rf"{told}.*source.layout=splits, or source.layout=classes"):
        len(source)
    assert len(open_pictures(tmp_path)) == len(names)  # evaluation asks for no classes


def test_the_layout_can_be_said(tmp_path):
    put(tmp_path, "train/a.png", "bus/b.png")  # a vehicle
    assert Folder(path=tmp_path, layout="classes").classes == ["bus", "train"]
    put(tmp_path / "more", "val/cat/a.png", "test/cat/b.png")
    assert facts(Folder(path=tmp_path / "more", layout="splits"))[0] == ["cat"]
    with pytest.raises(ValueError, match="beside it the folder bus"):
        len(Folder(path=tmp_path, layout="splits"))
    with pytest.raises(ValueError, match="layout is 'x'"):
        Folder(path=tmp_path, layout="x")
    with pytest.raises(ValueError, match="leave one out"):
        Folder(path=tmp_path, layout="splits", metadata="t.csv")


def test_a_folder_without_pictures_beside_the_splits_does_no_harm(tmp_path):
    put(tmp_path, "train/cat/a.png", "val/cat/b.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "all.json").write_text("{}")
    source = Folder(path=tmp_path)
    assert source.classes == ["cat"]
    assert source.skipped == {".json": 1}


def test_class_folders_that_are_links_are_followed_and_circles_end(tmp_path):
    put(tmp_path / "s", "bird/a.png", "bird/deep/b.png")
    put(tmp_path / "else", "cat/c.png", "dog/d.png")
    (tmp_path / "s" / "cat").symlink_to("../else/cat")
    (tmp_path / "s" / "dog").symlink_to(tmp_path / "else" / "dog")
    for place, target in (
        ("bird/deep/up", ".."),
        ("bird/self", "../bird"),
        ("home", "."),
        ("above", "../.."),
        ("x", "x"),
    ):
        (tmp_path / "s" / place).symlink_to(target)
    (tmp_path / "else" / "cat" / "back").symlink_to(tmp_path / "s")
    source = Folder(path=tmp_path / "s")
    assert source.classes == ["bird", "cat", "dog"]
    assert [r.name for r in source] == ["bird/a.png", "bird/deep/b.png", "cat/c.png", "dog/d.png"]
    assert source.skipped["folders that are read already"] == 5


def test_many_links_between_folders_take_no_time(tmp_path):
    folders = [tmp_path / f"c{n}" for n in range(12)]
    for folder in folders:
        put(folder, "a.png")
    for folder in folders:
        for other in folders:
            (folder / f"to_{other.name}").symlink_to(other)
    assert len(Folder(path=tmp_path)) == 12


def test_the_order_is_that_of_paths(tmp_path):
    names = ["a-b/1.png", "a/2.png", "a/b/3.png", "a.b/4.png", "B/5.png", "6.png"]
    put(tmp_path, *names)
    expected = [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*.png"))]
    assert [Folder(path=tmp_path).name(i) for i in range(len(names))] == expected


def test_stray_pictures_beside_class_folders_are_named_before_the_work(tmp_path):
    put(tmp_path / "in", "cat/a.png", "dog/b.png", "stray.png")
    with pytest.raises(ValueError, match=r"1 of 3 images have no label \(stray.png\)"):
        prepare(Folder(path=tmp_path / "in"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_every_picture_is_accounted_for(tmp_path, caplog):
    put(tmp_path / "in", "cat/a.png", "cat/b.JPG", "cat/c.jfif", "cat/d.heic", "cat/e", "cat/.f.png", "cat/more/g.png")
    (tmp_path / "in" / "cat" / "h.png").write_bytes(b"")
    (tmp_path / "in" / "cat" / "i.txt").write_text("i")
    (tmp_path / "in" / "dog").mkdir()
    with caplog.at_level(logging.INFO):
        prepare(Folder(path=tmp_path / "in"), tmp_path / "out")
    last = caplog.messages[-1]
    assert "3 images taken" in last
    assert "1 rejected" in last
    assert "5 skipped (1 .heic, 1 .jfif, 1 .txt, 1 hidden or system, 1 without suffix)" in last
    assert "folders without images: dog" in caplog.text
    rejected = json.loads((tmp_path / "out" / "rejected.jsonl").read_text())
    assert rejected == {"name": "cat/h.png", "reason": "not a readable picture: the file is empty"}
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert sum(meta["skipped"].values()) == 5


def test_what_limit_and_split_leave_out_is_counted(tmp_path):
    put(tmp_path / "in", *(f"{split}/c/{n}.png" for split in ("train", "val", "test") for n in range(4)))
    prepare(Folder(path=tmp_path / "in"), tmp_path / "out", limit=10)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["skipped"] == {"images beyond limit": 2, "images of a split that is not stored": 4}


def test_names_that_are_not_utf8(tmp_path):
    folder = tmp_path / "in"
    put(folder, "cat/a.png")
    os.rename(folder / "cat" / "a.png", os.fsencode(folder) + b"/cat/\xff.png")
    assert prepare(Folder(path=folder), tmp_path / "out", val_fraction=0.5, shuffle=True)["rejected"] == 0


def test_labels_from_one_and_names_that_are_shared_are_told(tmp_path, caplog):
    put(tmp_path / "in", "a.png")
    (tmp_path / "in" / "t.csv").write_text("path,label\n" + "".join(f"a.png,{n}\n" for n in (1, 2, 3)))
    prepare(Folder(path=tmp_path / "in", metadata="t.csv"), tmp_path / "out")
    assert "the labels run from 1 to 3: class 0 is empty" in caplog.text
    prepare(Folder(path=tmp_path / "in", metadata="t.csv", classes=["x", "crane", "dog", "crane"]), tmp_path / "two")
    assert "classes 1, 3 are all called crane" in caplog.text
    assert "1 of 4 classes have no images: 0 (x)" in caplog.text


def write_table(folder, text, name="t.csv"):
    put(folder, "a.png")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Folder(path=folder, metadata=name)


@pytest.mark.parametrize("path", ["../secret.png", "x/../../secret.png", "{outside}/secret.png", "..", "/dev/zero"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_table_reads_nothing_outside_its_folder(tmp_path, path, suffix):
    put(tmp_path, "secret.png")
    path = path.format(outside=tmp_path)
    lines = [json.dumps({"path": p}) for p in ("a.png", path)] if suffix == "jsonl" else ["path", "a.png", path]
    source = write_table(tmp_path / "in", "\n".join(lines) + "\n", f"t.{suffix}")
    with pytest.raises(
        ValueError, match=rf"t.{suffix}, line {2 if suffix == 'jsonl' else 3}: the path .* leads out of"
    ):
        source[1]


@pytest.mark.parametrize(
    "head", ["\ufeffpath,label", "path;label", "path\tlabel", "file_name,label", ' "Path" , Label']
)
def test_tables_of_other_programs(tmp_path, head):
    separator = next(mark for mark in (";", "\t", ",") if mark in head)
    source = write_table(tmp_path, f"{head}\r\na.png{separator}x\r\n")
    assert facts(source) == (["x"], [("a.png", 0, None)])


def test_a_table_without_paths_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match=r"its columns are name, text, and each row needs path or file_name"):
        len(write_table(tmp_path, "name,text\na.png,x\n"))


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        ('{"path": "a.png"}\n{"path": "b', "t.jsonl", "line 2: not JSON, or cut short"),
        ('{"path": "a.png"}\n\n[1]\n', "t.jsonl", "line 3: not an object"),
        ("[" * 100_000, "t.jsonl", "line 1: not JSON"),
        ('{"path": 3}\n', "t.jsonl", "line 1: the path is 3"),
        (b"path,label\na.png,\xe4\n", "t.csv", "line 2: not UTF-8"),
        ("path,caption\na.png,one, two\n", "t.csv", "line 2: 3 cells, the header has 2"),
        ('path,caption\na.png,"one\nb.png,two\n', "t.csv", "line 2: not CSV, or cut short"),
        ("path,label\na.png,0\n,1\n", "t.csv", "line 3: .*without path"),
        ("path,label\n".encode("utf-16"), "t.csv", "UTF-16"),
        ("", "t.csv", "no rows"),
    ],
)
def test_damage_in_a_table_has_its_line(tmp_path, text, name, told):
    with pytest.raises((ValueError, FileNotFoundError), match=rf"t\.{name[2:]}\W.*{told}") as caught:
        len(write_table(tmp_path, text, name))
    assert len(str(caught.value).splitlines()) == 1


def test_a_caption_with_everything_in_it_is_kept(tmp_path):
    source = write_table(tmp_path, 'path,caption\na.png,"one; ""two""\nthree, \u6f22"\n')
    assert source[0].caption == 'one; "two"\nthree, \u6f22'


def test_pixels_are_those_of_the_file(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(open_pictures(tmp_path).read([0])[0].permute(1, 2, 0).numpy(), image)
