"""A flipped bit in what was written is found when it is read, wherever it is; files without checksums are read too."""

import json
import shutil
import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
import torch.distributed.checkpoint as dcp

from official_files import saved
from smalto import convert
from smalto.errors import InputError
from smalto.inspect_path import checkpoint_facts
from smalto.runtime import compose
from smalto.tasks.checkpoint import load_task, load_tokenizer, start_from
from smalto.tasks.contents import EMA_KEY
from smalto.tasks.integrity import checksums, verified
from smalto.tasks.official_config import Hints
from smalto.tasks.registry import factory
from smalto.tasks.safetensors import CHECKSUMS, read_safetensors, write_safetensors
from smalto.tasks.sharded_folder import INDEX, INDEX_CHECKSUM, ShardWriter, read_folder, take_tensors, write_meta
from smalto.tasks.strategy import AnyCheckpoint
from smalto.tasks.weights import read_weights
from tasks.test_checkpoint import GPT_NODE, VQ_NODE, gpt_checkpoint, prefixed, tokenizer_checkpoint


def flipped(path: Path, place: int, *, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


def places(path: Path, tensor: torch.Tensor) -> list[int]:
    """First, middle and last byte of a tensor in a file."""
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    start = path.read_bytes().index(data)
    return [start, start + len(data) // 2, start + len(data) - 1]


@pytest.fixture
def content() -> dict[str, Any]:
    """A generator with averages, a tokenizer and the state of an optimizer."""
    gpt, vq = factory(GPT_NODE, "gpt", where="x")(), factory(VQ_NODE, "tokenizer", where="x")()
    shadow = {name: torch.randn_like(value) for name, value in gpt.named_parameters()}
    found = gpt_checkpoint(gpt, tokenizer_config=VQ_NODE, callbacks={EMA_KEY: {"num_updates": 1, "shadow": shadow}})
    found["state_dict"] |= prefixed(vq, "tokenizer")
    moments = {"exp_avg": torch.randn(40, 40), "step": torch.tensor(3.0)}
    return found | {"optimizer_states": [{"state": {0: moments}, "param_groups": []}]}


DAMAGED = r"is damaged.*checksums? (differ|of)"


@pytest.mark.parametrize("part", ["average", "tokenizer"])
def test_a_flipped_bit_of_what_is_used_is_found(tmp_path, content, part):
    tensor = (
        content["callbacks"][EMA_KEY]["shadow"]["output.weight"]
        if part == "average"
        else content["state_dict"]["tokenizer.decoder.conv_out.weight"]
    )
    good = saved(tmp_path / "good.ckpt", content)
    load_task(good)
    for place in places(good, tensor):
        path = shutil.copy(good, tmp_path / "x.ckpt")
        flipped(path, place)
        with pytest.raises(InputError, match=rf"x\.ckpt {DAMAGED}"):
            load_task(path)
        with pytest.raises(InputError, match=DAMAGED):
            checkpoint_facts(path, verify=True)
        with pytest.raises(InputError, match=DAMAGED):
            AnyCheckpoint().load_checkpoint(path)
        with pytest.raises(InputError, match=DAMAGED):
            read_weights(path, hints=Hints())
        load_task(path, verify=False)
        AnyCheckpoint(verify=False).load_checkpoint(path)


def test_other_readers_of_files(tmp_path, content):
    good = saved(tmp_path / "good.ckpt", content)
    task = load_task(good).task
    flipped(good, places(good, content["callbacks"][EMA_KEY]["shadow"]["output.weight"])[1])
    with pytest.raises(InputError, match=DAMAGED):
        start_from(task, good, kind="gpt")
    tokenizer = saved(tmp_path / "t.ckpt", tokenizer_checkpoint(factory(VQ_NODE, "tokenizer", where="x")()))
    flipped(tokenizer, places(tokenizer, torch.load(tokenizer)["state_dict"]["net.decoder.conv_out.weight"])[0])
    with pytest.raises(InputError, match=DAMAGED):
        load_tokenizer(tokenizer)
    load_tokenizer(tokenizer, verify=False)


def test_what_is_not_used_is_not_compared_but_by_inspect_and_resume(tmp_path, content):
    path = saved(tmp_path / "x.ckpt", content)
    flipped(path, places(path, content["optimizer_states"][0]["state"][0]["exp_avg"])[1])
    load_task(path)
    for read in (lambda: checkpoint_facts(path, verify=True), lambda: AnyCheckpoint().load_checkpoint(path)):
        with pytest.raises(InputError, match=DAMAGED):
            read()


def test_a_whole_checkpoint_is_in_memory_when_training_goes_on(tmp_path, content):
    path = saved(tmp_path / "x.ckpt", content)
    found = AnyCheckpoint().load_checkpoint(path)
    path.write_bytes(bytes(path.stat().st_size))
    moments = [tree["optimizer_states"][0]["state"][0]["exp_avg"] for tree in (found, content)]
    assert torch.equal(*moments)
    assert found["state_dict"].keys() == content["state_dict"].keys()
    assert all(torch.equal(found["state_dict"][name], value) for name, value in content["state_dict"].items())


def test_the_config_is_compared_too(tmp_path, content):
    path = saved(tmp_path / "x.ckpt", content)
    with ZipFile(path) as archive:
        pickled = next(archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    flipped(path, path.read_bytes().index(pickled) + pickled.index(b"drop_prob") + 3)
    with pytest.raises(InputError, match="Bad CRC-32"):
        load_task(path)


def test_safetensors_have_checksums_and_are_read_without(tmp_path, content):
    source = saved(tmp_path / "x.ckpt", content)
    convert.run(compose("convert", [f"in={source}", f"out={tmp_path}/x.safetensors", "format=safetensors"]))
    path = tmp_path / "x.safetensors"
    before = load_task(path).task.net.state_dict()
    raw = path.read_bytes()
    for place in places(path, content["callbacks"][EMA_KEY]["shadow"]["output.weight"]):
        flipped(path, place)
        with pytest.raises(InputError, match=DAMAGED):
            load_task(path)
        with pytest.raises(InputError, match=DAMAGED):
            checkpoint_facts(path, verify=True)
        load_task(path, verify=False)
        path.write_bytes(raw)
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    assert len(header["__metadata__"].pop(CHECKSUMS)) == 8 * (len(header) - 1)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])
    again = load_task(path).task.net.state_dict()
    assert all(torch.equal(again[name], value) for name, value in before.items()), "made before there were checksums"


def test_tensors_of_every_kind_are_written_and_compared(tmp_path):
    tensors = {"a": torch.randn(3, 5).t(), "b": torch.arange(7, dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    tensors |= {"d": torch.tensor(True), "e": torch.arange(5, dtype=torch.int8)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    found = read_safetensors(tmp_path / "x.safetensors")
    with verified(tmp_path / "x.safetensors", found.values()):
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert len(checksums(tmp_path / "x.safetensors")) == len(tensors)


def folder_of(path: Path, content: dict[str, Any]) -> Path:
    tree, tensors = take_tensors(content)
    path.mkdir()
    write_meta(path, tree)
    dcp.save(tensors, storage_writer=ShardWriter(path), no_dist=True)
    return path


def test_sharded_folders(tmp_path, content):
    content["callbacks"][EMA_KEY]["shadow"]["output.weight"] = torch.randn(32, 32)
    wide = torch.randn(64, 64)
    content["optimizer_states"][0]["state"][0]["exp_avg"] = wide
    good = folder_of(tmp_path / "good.ckpt", content)
    part = next(good.glob("*.distcp"))
    cases: list[tuple[str, Callable[[Path], None]]] = [
        ("a part", lambda path: flipped(path / part.name, places(part, wide)[1])),
        ("the index", lambda path: flipped(path / INDEX, (path / INDEX).read_bytes().index(b"exp_avg") + 1)),
        ("meta.pt", lambda path: flipped(path / "meta.pt", (path / "meta.pt").read_bytes().index(b"num_updates") + 1)),
    ]
    for number, (_, damage) in enumerate(cases):
        path = shutil.copytree(good, tmp_path / f"{number}.ckpt")
        damage(path)
        for read in (AnyCheckpoint().load_checkpoint, partial(checkpoint_facts, verify=True)):
            with pytest.raises(InputError, match=rf"{number}\.ckpt.*(checksum|CRC)"):
                read(path)
    read_folder(tmp_path / "0.ckpt", verify=False)
    (good / INDEX_CHECKSUM).unlink()
    read_folder(good)


@pytest.mark.slow
def test_what_comparing_costs(tmp_path):
    """Of a generator of the paper's smallest size, from the page cache, the least of five each, in turn."""
    node = GPT_NODE | {"dim": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 16384, "code_shape": [[16, 16]]}
    path = saved(tmp_path / "b.ckpt", gpt_checkpoint(factory(node, "gpt", where="x")(), tokenizer_config=None))
    content = torch.load(path)
    content["smalto"]["config"]["task"]["net"] = node
    torch.save(content, path)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(5):
        for verify, found in seconds.items():
            began = time.perf_counter()
            load_task(path, verify=verify)
            found.append(time.perf_counter() - began)
    cost = min(seconds[True]) / min(seconds[False]) - 1
    assert cost < 0.25, f"{cost:.0%}"  # on a machine that has other things to do; a quiet one: 0.05
