"""Tables, classes and text features as other people have them: misread, said in vain, or twice."""

import logging

import numpy as np
import pytest

from smalto.data.encode import Recipe
from smalto.data.sources import Folder
from smalto.data.text_blocks import read_features
from smalto.errors import UserError
from smalto.prepare import prepare_images
from tiny_pictures import put


def table(folder, text, name="t.csv"):
    put(folder, "a.png", "b.png")
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Folder(path=folder, metadata=name)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("t.csv", "path,label,Label\na.png,0,1\n", "the header has label twice"),
        ("t.jsonl", '{"path": "a.png", "label": 0, "label": 1}', "line 1: an object has label twice"),
        ("t.json", '[{"path": "a.png"}]', "holds JSON: write one object a line"),
        ("t.parquet", b"PAR1" + b"\x15\x04\x15" * 9, "no text"),
        ("t.csv", "path,label\na.png,0\n".encode("utf-16-le"), "UTF-16"),
        ("t.jsonl", '{"path": "a.png"}\n'.encode("utf-32"), "UTF-32"),
        ("t.jsonl", '[{"path": "a.png"},\n{"path": "b.png"}]', "each line is one object"),
        ("t.csv", 'path, caption\na.png, "x, y"\n', "with no space before them"),
    ],
)
def test_tables_that_would_be_misread_are_refused_for_what_they_are(tmp_path, name, text, told):
    with pytest.raises(UserError, match=told):
        len(table(tmp_path, text, name))


@pytest.mark.parametrize("name", ["t.JSONL", "t.ndjson"])
def test_json_lines_by_other_names(tmp_path, name):
    source = table(tmp_path, '{"Path": "a.png", "Label": "x"}\n{"path": "b.png", "LABEL": "y"}\n', name)
    assert [record.label for record in source] == [0, 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,labels,set\na.png,0,train\n", "columns that are not read: labels, set"),
        ("path,label\na.png,0\n./a.png,1\n", "1 rows name an image again with other labels"),
        ("path,split\na.png,train\na.png,val\n", "1 rows name an image again with other splits"),
    ],
)
def test_what_a_table_says_in_vain_or_twice_is_told(tmp_path, text, told, caplog):
    with caplog.at_level(logging.WARNING):
        len(table(tmp_path, text))
    assert told in caplog.text


def test_several_captions_of_an_image_are_rows_and_no_mistake(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(table(tmp_path, "path,label,caption\na.png,0,x\na.png,0,y\n")) == 2
    assert not caplog.text


@pytest.mark.parametrize("classes", [["cat"], ["cat", "dog", "dog"], []])
def test_classes_that_are_not_listed_are_refused_before_images_are_read(tmp_path, classes):
    source = Folder(path=put(tmp_path, "cat/a.png", "dog/b.png", "dog/c.png"), classes=classes)
    with pytest.raises(UserError, match=r"of 3 images .*not among source.classes.*'dog'"):
        source.check()


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["Cat", "cat"], "classes are called 'Cat', 'cat': nearly the same"),
        (["caf\u00e9", "cafe\u0301"], "nearly the same"),
        (["nan", "cat"], "classes are called nan: if that says there is no label"),
        (["0", "2000000"], "1999999 of 2000001 classes have no images: 1, 2, 3, 4, 5, ..."),
    ],
)
def test_classes_that_are_seldom_meant_are_told(tmp_path, labels, told, caplog):
    source = table(tmp_path / "in", "path,label\n" + "".join(f"a.png,{label}\n" for label in labels))
    options = {"split": "auto", "val_fraction": 0, "limit": None, "shuffle": False, "seed": 0, "shard_size": 9}
    options |= {"workers": 0, "max_rejected": 0, "overwrite": False, "description": {}, "command": ""}
    with caplog.at_level(logging.WARNING):
        prepare_images(source, out=tmp_path / "out", recipe=Recipe("keep", None, "png", 1), **options)
    assert told in caplog.text


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (2000000, 800), }".ljust(117) + "\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\x93NUMPY\x01\x00v\x00" + HUGE.encode() + b"x" * 99, "is not a whole .npy file"),
        (np.array([["a"]]), "text features are real numbers"),
        (np.ones((2, 3), complex), "text features are real numbers"),
        (np.ones((2, 3), bool), "text features are real numbers"),
        (np.ones((2, 0)), "has shape"),
    ],
)
def test_text_features_that_are_none(tmp_path, content, told):
    if isinstance(content, bytes):
        (tmp_path / "0.npy").write_bytes(content)
    else:
        np.save(tmp_path / "0.npy", content)
    with pytest.raises(UserError, match=rf"0.npy.*{told}") as refusal:
        read_features(tmp_path, ["0"])
    assert "allocate" not in str(refusal.value)  # it would have taken the memory where there was some
