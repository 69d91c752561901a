"""Files whose config asks for something: nothing runs, nothing is read from the environment, one line is said."""

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from official_files import saved, tiny_gpt
from smalto import convert, evaluation_job
from smalto.errors import InputError, UserError
from smalto.inspect_path import checkpoint_facts
from smalto.runtime import compose
from smalto.tasks.checkpoint import LoadedTask, load_task, load_tokenizer, start_from
from smalto.tasks.contents import CONFIG_KEY
from smalto.tasks.network import shell
from smalto.tasks.official_config import Hints
from smalto.tasks.weights import RECORD_KEY, read_weights
from tasks.test_checkpoint import GPT_NODE, VQ_NODE, factory, gpt_checkpoint, prefixed, tokenizer_checkpoint

SECRET = "SMALTO_TEST_SECRET"


@pytest.fixture(autouse=True)
def watched(tmp_path, monkeypatch) -> Iterator[None]:
    """A folder to work in, in which nothing appears that the test did not make, and a secret that nothing tells."""
    monkeypatch.setenv(SECRET, "hunter2")
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists(), "something of the file ran"


def call(target: str = "os.mkdir") -> dict[str, Any]:
    return {"_target_": target, "path": "ran"}


RESOLVED = "${oc.create:{_target_: os.mkdir, path: ran}}"
VALUES: dict[str, Any] = {
    "a call": call(),
    "a call through us": call("smalto.runtime.os.mkdir"),
    "a function of ours": call("smalto.tasks.checkpoint.load_task"),
    "a class of ours with side effects": {"_target_": "smalto.callbacks.checkpoint.LatestCheckpoint", "dirpath": "ran"},
    "a pipe": {"_target_": "smalto.data.streaming.StreamedImages", "urls": "pipe:mkdir ran", "image_size": 8},
    "an interpolation": RESOLVED,
    "an interpolation in a list": [RESOLVED],
    "lists in lists": [[[[call()]]]],
    "a dict": {"a": [{"b": call()}]},
    "the environment": "${oc.env:" + SECRET + "}",
    "a decoder": "${oc.decode:${oc.env:" + SECRET + "}}",
    "a list of targets": {"_target_": ["os.mkdir"]},
    "a method": {"_target_": "hydra.utils.get_method", "path": "os.mkdir"},
    "a partial": {"_target_": "functools.partial", "_args_": ["os.mkdir", "ran"], "_partial_": False},
    "an ordered dict": OrderedDict(call()),
    "huge": 10**30,
    "negative": -1,
    "a float": 0.5,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "true": True,
    "none": None,
    "text": "many",
    "bytes": b"ran",
    "a tensor": torch.ones(2),
    "a deep list": eval("[" * 60 + "]" * 60),
}
KEYS: dict[str, dict[Any, Any]] = {
    "_args_": {"_args_": ["ran"]},
    "_partial_": {"_partial_": call()},
    "_recursive_": {"_recursive_": True, "extra": call()},
    "_convert_": {"_convert_": "object"},
    "_target_": {"_target_": RESOLVED},
    "self": {"self": call()},
    "unknown": {"forward": call()},
    "kwargs": {"**": call()},
    "a number": {3: 4},
    "none": {None: 4},
    "a tuple": {("a", "b"): 4},
    "bytes": {b"dim": 4},
    "two lines": {"dim\nsmalto: all is well": 4},
    "dotted": {"conditioner._target_": "os.mkdir"},
}


def all_places(node: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        for key in node:
            yield (*prefix, key)
            yield from all_places(node[key], (*prefix, key))


def changed(tree: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    return dict(tree) | {place[0]: changed(tree[place[0]], place[1:], value)}


def quiet(read: Callable[[], Any], *, may_load: bool = False) -> None:
    """It is refused in one line that tells nothing secret, or read as if the value were mere text."""
    try:
        read()
    except UserError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert "hunter2" not in message
    else:
        assert may_load, "it was built"
    assert not Path("ran").exists()


def checkpoints() -> dict[str, dict[str, Any]]:
    vq = factory(VQ_NODE, "tokenizer", where="this test")()
    gpt = factory(GPT_NODE, "gpt", where="this test")()
    content = gpt_checkpoint(gpt, tokenizer_config=VQ_NODE)
    content["state_dict"] |= prefixed(vq, "tokenizer")
    return {"tokenizer": tokenizer_checkpoint(vq), "gpt": content}


@pytest.fixture(scope="module")
def good() -> dict[str, dict[str, Any]]:
    return checkpoints()


NODES = {"gpt": GPT_NODE, "tokenizer": VQ_NODE}
DECISIVE = {("dim",), ("num_layers",), ("conditioner",), ("quantizer",), ("_target_",), ("base_channels",)}


@pytest.mark.parametrize("value", VALUES)
def test_a_value_anywhere_in_a_network_is_data(value):
    """At every place of its config: refused, or taken for what it is."""
    for role, node in NODES.items():
        for place in [(), *all_places(node)]:
            hostile = changed(node, place, VALUES[value])
            harmless = place not in DECISIVE and place != ()
            quiet(lambda role=role, hostile=hostile: shell(factory(hostile, role, where="x"), "x"), may_load=harmless)


@pytest.mark.parametrize(
    "value",
    [pytest.param(value, marks=() if place % 4 == 0 else pytest.mark.slow) for place, value in enumerate(VALUES)],
)
def test_a_value_in_a_checkpoint_is_data(tmp_path, good, value):
    content, task = good["gpt"], (CONFIG_KEY, "config", "task")
    for place in ((*task, "net", "conditioner"), (*task, "decode_batch_size")):
        hostile = changed(content, place[:-1], content_at(content, place[:-1]) | {place[-1]: VALUES[value]})
        quiet(partial(load_task, saved(tmp_path / "x.ckpt", hostile)), may_load=place[-1] == "decode_batch_size")
    for place in ((), ("quantizer",)):
        hostile = changed(content, ("tokenizer_config", *place), VALUES[value])
        quiet(partial(load_task, saved(tmp_path / "x.ckpt", hostile)), may_load=VALUES[value] is None and not place)


def content_at(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("part", [(), ("quantizer",)])
def test_keys_that_hydra_would_obey_are_refused(tmp_path, good, key, part):
    place = (CONFIG_KEY, "config", "task", "net", *part)
    node = VQ_NODE["quantizer"] if part else VQ_NODE
    path = saved(tmp_path / "x.ckpt", changed(good["tokenizer"], place, node | KEYS[key]))
    for read in (load_tokenizer, load_task):
        quiet(lambda read=read: read(path))


WRONG: dict[str, tuple[tuple[str, ...], Any]] = {
    "config a list": ((CONFIG_KEY, "config"), [1]),
    "config text": ((CONFIG_KEY, "config"), "task"),
    "record a list": ((CONFIG_KEY,), []),
    "record none": ((CONFIG_KEY,), None),
    "no kind": ((CONFIG_KEY, "kind"), None),
    "another kind": ((CONFIG_KEY, "kind"), "os.system"),
    "kind a dict": ((CONFIG_KEY, "kind"), call()),
    "no task": ((CONFIG_KEY, "config", "task"), None),
    "task a list": ((CONFIG_KEY, "config", "task"), [call()]),
    "net text": ((CONFIG_KEY, "config", "task", "net"), RESOLVED),
    "classes numbers": ((CONFIG_KEY, "classes"), [1, 2, 3]),
    "classes a dict": ((CONFIG_KEY, "classes"), {"a": 1}),
    "step text": (("global_step",), "seven"),
    "step true": (("global_step",), True),
    "no weights": (("state_dict",), None),
    "weights a list": (("state_dict",), [torch.ones(1)]),
    "weights numbers": (("state_dict",), {"net.a": 1}),
    "weights by number": (("state_dict",), {1: torch.ones(1)}),
    "callbacks a list": (("callbacks",), [1]),
    "averages text": (("callbacks",), {"EMA": "shadow"}),
    "averages numbers": (("callbacks",), {"EMA": {"shadow": {"a": 1}}}),
    "tokenizer text": (("tokenizer_config",), RESOLVED),
    "official numbers": (("official",), {"a": 1}),
}


@pytest.mark.parametrize("case", WRONG)
def test_entries_of_another_kind_are_refused_everywhere(tmp_path, good, case):
    place, value = WRONG[case]
    path = saved(tmp_path / "x.ckpt", changed(dict.fromkeys(place[:1]) | good["gpt"], place, value))
    task = load_task(saved(tmp_path / "good.ckpt", good["gpt"])).task
    quiet(lambda: load_task(path))
    quiet(lambda: start_from(task, path, kind="gpt"), may_load=case in ("no task", "task a list", "net text"))
    quiet(lambda: read_weights(path, hints=Hints()))
    quiet(
        lambda: checkpoint_facts(path, verify=True),
        may_load=case in ("no task", "task a list", "net text"),
    )


def test_no_more_memory_is_taken_than_the_file_has_weights(tmp_path, good):
    """Sizes of terabytes in the config, in a tensor of one number, and in what no tensor shows."""
    node = good["gpt"][CONFIG_KEY]["config"]["task"]["net"]
    for sizes in (
        {"vocab_size": 10**12},
        {"dim": 2**40, "num_heads": 2**30},
        {"num_layers": 10**9},
        {"code_shape": [[10**6, 10**6]]},
        {"code_shape": [[2**31, 2**31]]},
        {"ffn_multiple_of": 10**12},
        {"conditioner": node["conditioner"] | {"num_classes": 10**13}},
    ):
        path = saved(tmp_path / "x.ckpt", changed(good["gpt"], (CONFIG_KEY, "config", "task", "net"), node | sizes))
        quiet(lambda path=path: load_task(path))
    wide = torch.zeros(1).expand(10**12, 32)
    weights = good["gpt"]["state_dict"] | {"net.token_embedding.weight": wide, "net.output.weight": wide}
    content = changed(good["gpt"], (CONFIG_KEY, "config", "task", "net"), node | {"vocab_size": 10**12})
    with pytest.raises(InputError, match="would take"):
        load_task(saved(tmp_path / "x.ckpt", content | {"state_dict": weights}))
    for sizes in ({"channel_multipliers": [1] * 10**5}, {"num_res_blocks": 10**9}, {"image_size": 2**60}):
        place = (CONFIG_KEY, "config", "task", "net")
        path = saved(tmp_path / "x.ckpt", changed(good["tokenizer"], place, VQ_NODE | sizes))
        quiet(lambda path=path: load_task(path), may_load="image_size" in sizes)


def test_trees_without_end_are_refused(tmp_path, good):
    deep: Any = {}
    for _ in range(100):
        deep = {"a": deep}
    loop: list[Any] = []
    loop.append(loop)
    laughs: Any = ["ha"]
    for _ in range(30):
        laughs = [laughs] * 10
    for tree in (deep, loop, laughs):
        with pytest.raises(InputError, match=r"(without|no) end|it holds itself"):
            load_task(saved(tmp_path / "x.ckpt", good["gpt"] | {"more": tree}))


@pytest.mark.parametrize("node", [VALUES["a call"], {"_target_": "smalto.tokenizers.vqgan.VQModel", "net": RESOLVED}])
def test_an_exported_file_of_the_authors_layout(tmp_path, node):
    record = {"config": {"kind": "gpt", "task": {"net": node}}, "classes": [], "step": 1}
    options = ["image_size=16", "num_heads=2", "downsample_factor=2"]
    for wrong in (record, [record], {"config": RESOLVED}, {"config": {"task": RESOLVED}}, RESOLVED):
        path = saved(tmp_path / "x.pt", {"model": tiny_gpt(), RECORD_KEY: wrong})
        quiet(lambda path=path: convert.run(compose("convert", [f"in={path}", "out=y.ckpt", *options])))


@pytest.mark.parametrize("value", ["a call", "an interpolation", "huge"])
def test_the_json_beside_safetensors(tmp_path, good, value):
    path = saved(tmp_path / "x.ckpt", good["gpt"])
    convert.run(compose("convert", [f"in={path}", "out=x.safetensors", "format=safetensors"]))
    beside = tmp_path / "x.json"
    whole = json.loads(beside.read_text())
    for place in [place for place in all_places(whole) if len(place) < 4 or place[-1] == "net"]:
        beside.write_text(json.dumps(changed(whole, place, VALUES[value])))
        quiet(lambda: load_task(tmp_path / "x.safetensors"), may_load=True)
    for text in ("[]", "3", '"' + RESOLVED + '"', "{", "[" * 10**5, "\xff", json.dumps({"smalto": [RESOLVED]})):
        beside.write_text(text, encoding="latin-1")
        quiet(lambda: load_task(tmp_path / "x.safetensors"))


def loaded(config: Any, kind: str = "gpt") -> LoadedTask:
    return LoadedTask(task=None, kind=kind, config=config, step=0, classes=[])


@pytest.mark.parametrize("value", VALUES)
def test_the_data_that_a_file_names_is_shards_of_codes_or_nothing(tmp_path, value):
    codes = {
        "_target_": "smalto.data.codes.CodeShards",
        "path": str(tmp_path / "nowhere"),
        "batch_size": 2,
        "seed": 0,
        "codebook_size": 8,
        "code_shape": [[2, 2]],
        "crops": "all",
    }
    assert evaluation_job.code_shards(loaded({"data": codes | {"num_workers": 10**6}})) is None, "they are gone"
    for data in (VALUES[value], *(codes | {key: VALUES[value]} for key in codes)):
        quiet(lambda data=data: evaluation_job.code_shards(loaded({"data": data})), may_load=True)


def test_streams_from_files_are_never_opened(tmp_path):
    stream = {
        "_target_": "smalto.data.streaming.StreamedImages",
        "urls": "pipe:mkdir ran",
        "val_path": "pipe:mkdir ran",
        "image_size": 8,
        "batch_size": 1,
        "steps_per_epoch": 1,
        "augment": "center_crop",
        "flip_prob": 0,
        "buffer_size": 1,
        "num_workers": 0,
        "seed": 0,
        "max_skipped": 0,
    }
    assert evaluation_job.code_shards(loaded({"data": stream})) is None


def test_interpolation_would_have_run_it():
    """The attack is real: what is refused above is what OmegaConf and Hydra make of it."""
    resolved = OmegaConf.to_container(OmegaConf.create({"a": RESOLVED}), resolve=True)
    assert resolved == {"a": call()}
    assert os.environ[SECRET] == OmegaConf.create({"a": VALUES["the environment"]}).a
