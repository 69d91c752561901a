"""Readers of weights under damaged and hostile bytes: one line, no hang, no memory; never a traceback."""

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch

from fuzzing import mutations, survives
from official_files import saved
from smalto.inspect_path import checkpoint_facts
from smalto.tasks.checkpoint import load_task, read_checkpoint
from smalto.tasks.integrity import all_tensors
from smalto.tasks.official_config import Hints
from smalto.tasks.registry import factory
from smalto.tasks.safetensors import read_safetensors, write_safetensors
from smalto.tasks.sharded_folder import INDEX, INDEX_CHECKSUM, META, read_folder
from smalto.tasks.torch_file import read_torch_file
from smalto.tasks.weights import read_weights
from tasks.test_checkpoint import GPT_NODE, gpt_checkpoint
from tasks.test_integrity import folder_of

NODE = GPT_NODE | {"dim": 16, "num_layers": 1, "num_heads": 2, "code_shape": [[2, 2]], "vocab_size": 8}
Case = tuple[bytes, Path, Callable[[Any], Any], Any]
"""Good bytes, where variants of them go, the reader, and what it is given."""


def tiny() -> dict[str, Any]:
    content = gpt_checkpoint(factory(NODE, "gpt", where="x")(), tokenizer_config=None)
    content["smalto"]["config"]["task"]["net"] = NODE
    return content


def use(content: Any) -> None:
    """Read every byte."""
    for tensor in all_tensors(content):
        if tensor.device.type == "cpu":
            tensor.clone()


def as_checkpoint(path: Path) -> None:
    """As ``smalto inspect``, ``sample`` and ``convert`` read it, without the checksums that would find it all."""
    use(read_torch_file(path))
    checkpoint_facts(path, verify=False)
    load_task(path, verify=False)
    read_weights(path, hints=Hints(), verify=False)


def checkpoint_case(folder: Path) -> Case:
    path = saved(folder / "x.ckpt", tiny())
    return path.read_bytes(), path, as_checkpoint, path


def pickle_case(folder: Path) -> Case:
    """The pickle of a checkpoint alone, in an archive that fits: what the checksum of the archive would find."""
    path = saved(folder / "x.ckpt", tiny())
    with ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in entries if name.endswith("data.pkl"))

    def packed_and_read(_: Path) -> None:
        data = (folder / "data.pkl").read_bytes()
        with ZipFile(path, "w") as archive:
            for entry, content in entries.items():
                archive.writestr(entry, data if entry == name else content)
        as_checkpoint(path)

    return entries[name], folder / "data.pkl", packed_and_read, path


def old_case(folder: Path) -> Case:
    path = folder / "x.ckpt"
    torch.save(tiny(), path, _use_new_zipfile_serialization=False)
    return path.read_bytes(), path, as_checkpoint, path


def safetensors_case(folder: Path) -> Case:
    path = folder / "x.safetensors"
    write_safetensors(path, tiny()["state_dict"])
    return path.read_bytes(), path, lambda path: use(read_safetensors(path)), path


def json_case(folder: Path) -> Case:
    content = tiny()
    path = folder / "x.safetensors"
    write_safetensors(path, content.pop("state_dict"))
    path.with_suffix(".json").write_text(json.dumps(content))
    return path.with_suffix(".json").read_bytes(), path.with_suffix(".json"), load_task, path


def folder_case(name: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        content = tiny()
        content["state_dict"]["net.token_embedding.weight"] = torch.randn(64, 32)
        path = folder_of(folder / "x.ckpt", content)
        (path / INDEX_CHECKSUM).unlink()
        file = path / name if name else next(path.glob("*.distcp"))

        def read(path: Path) -> None:
            use(read_folder(path, verify=False))
            checkpoint_facts(path, verify=True)
            read_checkpoint(path, ema=True)

        return file.read_bytes(), file, read, path

    return case


CASES: dict[str, Callable[[Path], Case]] = {
    "checkpoint": checkpoint_case,
    "its pickle": pickle_case,
    "old checkpoint": old_case,
    "safetensors": safetensors_case,
    "json beside it": json_case,
    "index of a folder": folder_case(INDEX),
    "meta of a folder": folder_case(META),
    "part of a folder": folder_case(""),
}


def fuzz(case: str, folder: Path, *, count: int, seed: int) -> None:
    good, place, read, given = CASES[case](folder)
    refused = 0
    for data in mutations(good, count=count, seed=seed):
        place.write_bytes(data)
        refused += survives(read, given) is not None
    assert refused > count / 4, "the mutations reach the reader"


@pytest.mark.parametrize("case", CASES)
def test_some_damaged_files(case, tmp_path):
    fuzz(case, tmp_path, count=40, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_damaged_files(case, tmp_path):
    fuzz(case, tmp_path, count=10_000, seed=1)


def header(entries: Any) -> bytes:
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return struct.pack("<Q", len(text)) + text


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 2**62) + bytes(100),
        header(b"[" * 100_000),
        header([]) + bytes(8),
        header({"a": None}) + bytes(8),
        header(entry(shape=[10**12])) + bytes(8),
        header(entry(shape=[0, 10**30])) + bytes(8),
        header(entry(shape=[-1])) + bytes(8),
        header(entry(shape=[2.0])) + bytes(8),
        header(entry(shape=[True, 2])) + bytes(8),
        header(entry(data_offsets=[8, 0])) + bytes(8),
        header(entry(data_offsets=[-8, 0])) + bytes(8),
        header(entry(data_offsets=[0, 8.0])) + bytes(8),
        header(entry(data_offsets=[0, 2**70])) + bytes(8),
        header(entry(dtype=["F32"])) + bytes(8),
        header(entry() | {"two\nlines": entry()["a"]}) + bytes(8),
        header(b'{"a": NaN}') + bytes(8),
        header(b"\xff\xfe") + bytes(8),
        header(b"9" * 10_000) + bytes(8),
        header({"__metadata__": 3, **entry()}) + bytes(8),
        header({str(i): entry()["a"] for i in range(1000)}) + bytes(8),
    ],
)
def test_hostile_headers(content, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert survives(lambda path: use(read_safetensors(path)), path) is not None


def bomb(folder: Path) -> Path:
    path = saved(folder / "good.ckpt", tiny())
    with ZipFile(path) as archive, ZipFile(folder / "x.ckpt", "w", ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
            if name.endswith("version"):
                packed.writestr(name.replace("version", "byteorder2"), bytes(2**24))
    return folder / "x.ckpt"


def calling(module: str, name: str, argument: int) -> bytes:
    """A pickle that calls something with a number."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"J" + struct.pack("<i", argument) + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("builtins", "bytearray"),
        ("torch", "Tensor"),
        ("torch.storage", "UntypedStorage"),
        ("torch", "FloatTensor"),
        ("collections", "Counter"),
        ("torch._utils", "_rebuild_wrapper_subclass"),
        ("os", "system"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_pickles_that_ask_for_memory(module, name, old, tmp_path):
    path, data = saved(tmp_path / "x.ckpt", tiny()), calling(module, name, 2**31 - 1)
    if old:
        buffer = io.BytesIO()
        torch.save({}, buffer, _use_new_zipfile_serialization=False)
        start = buffer.getvalue().index(b"\x80\x02}q\x00.")
        path.write_bytes(buffer.getvalue()[:start] + data)
    else:
        with ZipFile(path) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with ZipFile(path, "w") as archive:
            for entry_name, content in entries.items():
                archive.writestr(entry_name, data if entry_name.endswith("data.pkl") else content)
    error = survives(read_torch_file, path)
    assert f"{module}.{name}" in str(error), error


def test_packed_archives_and_links_are_refused(tmp_path):
    assert "compressed" in str(survives(read_torch_file, bomb(tmp_path)))


def test_an_index_that_leads_elsewhere(tmp_path):
    good, place, read, given = CASES["index of a folder"](tmp_path)
    name = next(given.glob("*.distcp")).name
    assert len(name) == len("../outside.x")
    place.write_bytes(good.replace(name.encode(), b"../outside.x"))
    assert "outside of the folder" in str(survives(read, given))
