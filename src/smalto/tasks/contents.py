"""What may lie in a file: plain data and plain tensors, no more of them than the file has bytes for.

A few bytes can announce a tensor of terabytes, a tree without an end, or text in place of a number. It is refused here,
before anything walks through it.
"""

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.errors import InputError

DEPTH = 64
"""Of dicts and lists in each other; a checkpoint of a training has eight."""
ENTRIES = 1_000_000
"""In all of them; the checkpoint of a training has some thousand."""
SHARED = 4
"""How often tensors may name the same bytes of a file: an average that begins as the weights, tied layers."""
SPARE = 2**26
"""Bytes of tensors that are not counted."""
KINDS = ("gpt", "tokenizer")
CONFIG_KEY = "smalto"
"""Entry of a checkpoint that holds ``{"version", "kind", "config"}`` as plain data."""
EMA_KEY = "EMA"
"""Callback state that holds averaged weights, ``{"shadow": {name: tensor}, ...}``."""
OFFICIAL_KEY = "official"
"""Entry with buffers of the LlamaGen authors' code, kept for the way back into their layout."""


def check_plain(tree: Any, size: int) -> None:
    """Go through all that was read from a file of ``size`` bytes.

    Raises:
        InputError: something of it that nothing here can use, or that would take memory without end.
    """
    waiting: list[tuple[Any, int]] = [(tree, 0)]
    entries, announced = 0, 0
    while waiting:
        value, depth = waiting.pop()
        entries += 1
        if depth > DEPTH or entries > ENTRIES:
            raise InputError("it holds dicts or lists within each other without end")
        if isinstance(value, Tensor):
            announced += _bytes(value)
            if _bytes(value) > size + SPARE or announced > SHARED * size + SPARE:
                raise InputError(f"its tensors would take {announced:,} bytes, the file has {size:,}")
        elif type(value) in (dict, OrderedDict):
            odd = next((key for key in value if type(key) is str and not key.isprintable()), None)
            if odd is not None:
                raise InputError(f"it has an entry named {odd[:60]!r}")
            waiting.extend((entry, depth + 1) for pair in value.items() for entry in pair)
        elif type(value) in (list, tuple, torch.Size):
            waiting.extend((entry, depth + 1) for entry in value)
        elif type(value) is argparse.Namespace:
            waiting.append((vars(value), depth + 1))
        elif not (value is None or type(value) in (str, bytes, int, float, bool, torch.dtype)):
            raise InputError(f"it holds a {type(value).__name__}, which is neither plain data nor a tensor")


def _bytes(tensor: Tensor) -> int:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_quantized or tensor.device.type != "cpu":
        raise InputError("it holds a tensor of an unusual kind (sparse, quantized, nested or without data)")
    return tensor.numel() * tensor.element_size()


def about_run(checkpoint: Any, path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: ``version``, ``kind``, ``config``, ``classes``; the rest of it is looked at.

    Raises:
        InputError: it says nothing, because smalto did not write it, or an entry is not what it must be.
    """
    if not isinstance(checkpoint, dict) or CONFIG_KEY not in checkpoint:
        raise InputError(
            f"{path} carries no smalto config; only checkpoints written by smalto train can be used here (a file of "
            f"the LlamaGen authors becomes one by smalto convert in={path} out=NAME.ckpt)"
        )
    entry = checkpoint[CONFIG_KEY]
    kind = _entry(entry, "kind", str, path, CONFIG_KEY)
    if kind not in KINDS:
        raise InputError(f"{path} says that it holds a {kind[:60]!r}, smalto knows {' and '.join(KINDS)}")
    _check_record(entry, path, CONFIG_KEY)
    _tensors(checkpoint, "state_dict", path)
    _tensors(checkpoint, OFFICIAL_KEY, path, optional=True)
    _entry(checkpoint, "global_step", int, path, optional=True)
    _entry(checkpoint, "tokenizer_config", dict, path, optional=True)
    callbacks = _entry(checkpoint, "callbacks", dict, path, optional=True) or {}
    if EMA_KEY in callbacks:
        _tensors(_entry(callbacks, EMA_KEY, dict, path, "callbacks"), "shadow", path, f"callbacks.{EMA_KEY}")
    return entry


def about_export(record: Any, path: Path) -> dict[str, Any]:
    """What an exported file in the authors' layout says of its run, looked at; empty where it says nothing."""
    if record is None:
        return {}
    _check_record(record, path, "smalto_export")
    return record


def _check_record(record: Any, path: Path, name: str) -> None:
    _entry(record, "config", dict, path, name)
    _entry(record, "step", int, path, name, optional=True)
    if not all(type(entry) is str for entry in _entry(record, "classes", list, path, name, optional=True) or []):
        raise InputError(f"{path} is damaged: its {name}.classes must be names")


def network_node(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the config in a file says of the network.

    Raises:
        InputError: nothing.
    """
    return _entry(_entry(config, "task", dict, path, "config"), "net", dict, path, "config.task")


def _entry(tree: Any, key: str, kind: type, path: Path, inside: str = "", *, optional: bool = False) -> Any:
    name = f"{inside}.{key}".removeprefix(".")
    value = tree.get(key) if isinstance(tree, dict) else None
    if value is None and optional:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise InputError(f"{path} is damaged: its {name} is {found}, it must be a {kind.__name__}; copy it again")
    return value


def _tensors(tree: Any, key: str, path: Path, inside: str = "", *, optional: bool = False) -> None:
    found = _entry(tree, key, dict, path, inside, optional=optional) or {}
    if not all(type(name) is str and isinstance(value, Tensor) for name, value in found.items()):
        raise InputError(f"{path} is damaged: its {f'{inside}.{key}'.removeprefix('.')} must hold tensors by name")


def section(config: Any, *keys: str) -> dict[str, Any]:
    """A part of a config from a file; empty where there is none."""
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config if isinstance(config, dict) else {}
