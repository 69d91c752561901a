"""A meta.json comes with a data set from whoever made it: what it says is looked at before it is believed."""

import json
import math
import os
from typing import Any

import numpy as np
import pytest

from data.test_codes import code_shards
from fuzzing import survives
from smalto import inspect_path
from smalto.analysis.shard_facts import code_facts, code_statistics, image_facts
from smalto.data.code_reader import CodeReader
from smalto.data.codes import add_code_block, add_row_sums
from smalto.data.health import shard_meta, shard_problems
from smalto.data.meta import meta_problems
from smalto.data.shards import CODES, IMAGES, read_meta
from smalto.data.text_blocks import TextReader
from smalto.data.write import TarShard, npy_bytes
from smalto.errors import UserError
from smalto.files import write_json
from smalto.planning.dataset import stored_bytes, training_images
from smalto.runtime import compose

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    10**18,
    10**400,
    1.5,
    math.nan,
    "x",
    "/etc/passwd",
    [],
    [[]],
    [[10**9] * 2],
    {},
    {"a": 1},
]
KEYS = ["version", "splits", "num_classes", "classes", "codebook_size", "code_shape", "crops", "tokenizer", "dtype"]


def use(path) -> None:
    """As the verbs do: inspect, plan, extract, train and evaluate."""
    training_images({"path": str(path)}, wanted=None)
    stored_bytes({"path": str(path)})
    found = shard_meta(path)
    if found is not None and not shard_problems(path, found, verify=True):
        if found["format"] == CODES:
            code_facts(path, found | {"crop_range": [1.1], "images": {"path": "x"}})
            code_statistics(path, found)
        else:
            image_facts(path, found)
    meta = read_meta(path, CODES)
    for split in meta["splits"]:
        CodeReader(path, meta, split).gather(np.arange(4), np.zeros(4, np.int64))


@pytest.mark.parametrize("key", KEYS)
def test_values_of_any_kind(key, tmp_path):
    meta = code_shards(tmp_path)
    for value in [*VALUES, ...]:
        changed = {k: v for k, v in (meta | {key: value}).items() if v is not ...}
        write_json(tmp_path / "meta.json", changed)
        survives(use, tmp_path)


@pytest.mark.parametrize("key", ["name", "bytes", "num_images", "sha256"])
def test_values_of_a_shard(key, tmp_path):
    meta = code_shards(tmp_path)
    for value in [*VALUES, "../train-00000.tar", "\x1b[2J.tar", "train-00001.tar"]:
        changed = json.loads(json.dumps(meta))
        changed["splits"]["train"]["shards"][0][key] = value
        write_json(tmp_path / "meta.json", changed)
        survives(use, tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "9" * 10_000, "3", "[]", '{"format": ["smalto-codes"], "version": 1}']
)
def test_what_is_no_object(text, tmp_path):
    (tmp_path / "meta.json").write_text(text)
    survives(use, tmp_path)
    with pytest.raises(UserError):
        read_meta(tmp_path, IMAGES)


def test_a_pipe_is_no_meta_json(tmp_path):
    os.mkfifo(tmp_path / "meta.json")
    assert shard_meta(tmp_path) is None


def with_block(folder, codes, labels, lengths=None, features=None, **changes):
    meta = code_shards(folder)
    with TarShard(folder / "train-00000.tar") as shard:
        add_row_sums(shard, [add_code_block(shard, 0, codes, labels)])
        if lengths is not None:
            shard.add("000000.text.npy", npy_bytes(features))
            shard.add("000000.text_length.npy", npy_bytes(lengths))
        record = shard.close() | {"num_images": len(codes)}
    meta |= {"splits": {"train": {"num_images": len(codes), "shards": [record]}}} | changes
    write_json(folder / "meta.json", meta)
    return meta


def test_codes_beyond_their_codebook_are_not_counted(tmp_path):
    """A count of each up to the largest would take 32 GB."""
    codes = np.full((4, 10, 6), 2**32 - 1, np.uint32)
    meta = with_block(tmp_path, codes, np.zeros(4, np.int64), dtype="uint32")
    assert "its codebook has 50" in str(survives(lambda path: code_statistics(path, meta), tmp_path))


@pytest.mark.parametrize(
    "labels", [np.full(4, 2**31 - 1), np.full(4, 2**32), np.full(4, -7), np.full(4, 0.5), np.zeros((4, 2), np.int64)]
)
def test_labels_beyond_their_classes_are_not_counted(labels, tmp_path):
    codes = np.zeros((4, 10, 6), np.uint16)
    meta = with_block(tmp_path, codes, np.zeros(4, np.int64))
    with TarShard(tmp_path / "train-00000.tar") as shard:
        shard.add("000000.codes.npy", npy_bytes(codes))
        shard.add("000000.label.npy", npy_bytes(labels))
        meta["splits"]["train"]["shards"] = [shard.close() | {"num_images": 4}]
    assert "labels" in str(survives(lambda path: code_statistics(path, meta), tmp_path))


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        (np.array([-2, 6, 1, 1], np.int32), np.zeros((6, 8), np.float16)),
        (np.array([1.5, 1.5, 1, 2], np.float32), np.zeros((6, 8), np.float16)),
        (np.array([1, 2, 1, 2], np.int32), np.zeros((6, 4), np.float16)),
        (np.array([1, 2, 1, 2], np.int32), np.zeros((6, 8), np.float64)),
    ],
)
def test_text_that_is_not_what_is_said(lengths, text, tmp_path):
    meta = with_block(tmp_path, np.zeros((4, 10, 6), np.uint16), np.zeros(4, np.int64), lengths, text, text={"dim": 8})
    assert survives(lambda path: TextReader(path, meta, "train").gather(np.arange(4), 3), tmp_path)


def test_names_from_files_neither_command_the_terminal_nor_rich(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))
    meta = {"num_classes": 3, "classes": ["\x1b]0;mine\x07", "[/x]", "[bold]猫"], "image_size": None, "encoding": "png"}
    write_json(
        tmp_path / "meta.json",
        {"format": IMAGES, "version": 1, "splits": {"train": {"num_images": 0, "shards": []}}} | meta,
    )
    inspect_path.run(compose("inspect", [f"path={tmp_path}"]))
    shown = capsys.readouterr().out
    assert "\\x1b]0;mine\\x07, [/x], [bold]猫" in shown
    assert "\x1b" not in shown


def test_sets_of_several_sizes_and_without_labels_are_sound():
    entry = {"num_images": 0, "shards": []}
    for classes, size in ((None, None), (10, [384, 384]), (1000, [512, 300])):
        meta = {"format": IMAGES, "version": 1, "splits": {"train": entry}, "num_classes": classes, "image_size": size}
        assert meta_problems(meta | {"classes": ["猫", "naïve café"], "encoding": "png"}) == []
