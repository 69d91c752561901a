"""What a config from a file may name, and how it is built.

A config that lies in a checkpoint comes from whoever made the file. It is data: nothing in it is resolved, imported or
called. A node of it names one of the classes below by the name that files have for it; its other entries are keywords
of that class, each compared with the kind the class declares.
"""

import inspect
import types
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from smalto.errors import InputError


@dataclass(frozen=True)
class Known:
    """A class that files may name.

    Args:
        role: what it can be in a config.
        place: where it is today, ``module:class``; the names that files have for it stay.
        parts: keywords that take another node, and its role.
        later: keywords that whoever calls the factory gives.
        repeated: keywords, or the lengths of their lists, that say how many layers there are.
    """

    role: str
    place: str
    parts: dict[str, str] = field(default_factory=dict)
    later: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()


KNOWN = {
    "smalto.models.gpt.GPT": Known(
        "gpt", "smalto.models.gpt:GPT", parts={"conditioner": "conditioner"}, repeated=("num_layers",)
    ),
    "smalto.models.conditioner.ClassConditioner": Known(
        "conditioner", "smalto.models.conditioner:ClassConditioner", later=("dim",)
    ),
    "smalto.models.conditioner.TextConditioner": Known(
        "conditioner", "smalto.models.conditioner:TextConditioner", later=("dim",)
    ),
    "smalto.tokenizers.vqgan.VQModel": Known(
        "tokenizer",
        "smalto.tokenizers.vqgan:VQModel",
        parts={"quantizer": "quantizer"},
        repeated=("channel_multipliers", "num_res_blocks"),
    ),
    "smalto.tokenizers.quantize.VectorQuantizer": Known("quantizer", "smalto.tokenizers.quantize:VectorQuantizer"),
    "smalto.losses.patchgan.PatchDiscriminator": Known(
        "discriminator", "smalto.losses.patchgan:PatchDiscriminator", repeated=("num_layers",)
    ),
    "smalto.losses.stylegan.StyleGANDiscriminator": Known(
        "discriminator", "smalto.losses.stylegan:StyleGANDiscriminator"
    ),
    # Of a task only what it does after training is built: what it takes for training may need packages and files of
    # the machine that trained.
    "smalto.tasks.gpt.GPTTask": Known(
        "task of a gpt",
        "smalto.tasks.gpt:GPTTask",
        later=("net", "optimizer", "schedule", "tokenizer_ckpt", "compile"),
    ),
    "smalto.tasks.tokenizer.TokenizerTask": Known(
        "task of a tokenizer",
        "smalto.tasks.tokenizer:TokenizerTask",
        later=("net", "optimizer", "schedule", "discriminator", "perceptual", "compile", "init_discriminator"),
    ),
    "smalto.data.codes.CodeShards": Known("codes", "smalto.data.codes:CodeShards", later=("num_workers",)),
}
"""By the name in files. A class that moves gets a new ``place``, one that is renamed a second line."""

MARKS = {"_target_", "_partial_"}
"""Of all that Hydra knows, what our configs have; whether a node was partial does not matter, all make factories."""
QUOTES = "'\""
MOST_LAYERS = 1000
"""Where no tensors say how many there are."""


def factory(node: Any, role: str, *, where: str, layers: int = MOST_LAYERS) -> Callable[..., Any]:
    """A function that makes what ``node`` describes; nothing is made yet.

    Args:
        node: of a config from a file.
        role: what is needed here.
        where: for messages, for instance ``the config in FILE``.
        layers: no more than so many of anything.

    Raises:
        InputError: it names something else, or keywords or values that this class does not take.
    """
    known = _known(node, role, where)
    made = getattr(import_module(known.place.partition(":")[0]), known.place.partition(":")[2])
    name, parameters, kinds = made.__name__, inspect.signature(made).parameters, get_type_hints(made.__init__)
    given = {key: value for key, value in node.items() if key not in MARKS and key not in known.later}
    unknown = [repr(key) for key in given if key not in parameters]
    if unknown:
        raise InputError(
            f"{where} gives {', '.join(unknown)[:200]} to {name}, which this version of smalto has not got; use the "
            "version that wrote it"
        )
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in given and key not in known.later
    ]
    if missing:
        raise InputError(f"{where} does not say the {', '.join(missing)} of {name}; the file is damaged")
    keywords: dict[str, Any] = {}
    for key, value in given.items():
        if key in known.parts:
            keywords[key] = factory(value, known.parts[key], where=where, layers=layers)
            continue
        if not fits(value, kinds[key]):
            raise InputError(f"{where} says {key}={_shown(value)} of {name}, which must be {_named(kinds[key])}")
        number = len(value) if isinstance(value, (list, tuple)) else value
        if key in known.repeated and not 0 <= number <= layers:
            raise InputError(f"{where} says {key}={_shown(value)} of {name}, the file has {layers} tensors in all")
        keywords[key] = value
    return partial(made, **keywords)


def _known(node: Any, role: str, where: str) -> Known:
    if not isinstance(node, dict):
        raise InputError(f"{where} has {_shown(node)} where the {role} should be described; the file is damaged")
    target = node.get("_target_")
    known = KNOWN.get(target) if isinstance(target, str) else None
    if known is None or known.role != role:
        raise InputError(
            f"{where} wants to build {_shown(target).strip(QUOTES)} as the {role}; from files only "
            f"{' or '.join(_targets(role))} is built there, so that opening a file runs no other code"
        )
    hydra = [str(key) for key in node if str(key).startswith("_") and key not in MARKS]
    if not isinstance(node.get("_partial_", True), bool):
        hydra.append("_partial_")
    if hydra:
        raise InputError(f"{where} holds {', '.join(hydra)[:200]}, which no config of smalto has, or not so")
    return known


def _targets(role: str) -> Collection[str]:
    return [name for name, known in KNOWN.items() if known.role == role]


def fits(value: Any, kind: Any) -> bool:
    """Whether a plain value is of an annotated kind; whole numbers are numbers, true and false are not.

    Text with ``${`` in it is of no kind: it was meant to become something else.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if origin is Literal:
        return type(value) is str and value in get_args(kind)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return type(value) in (list, tuple) and all(fits(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float)
    if kind in (str, Path):
        return type(value) is str and "${" not in value and "\0" not in value
    return kind in (int, bool, type(None)) and type(value) is kind


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (dict, list, tuple)) else repr(value)[:100]


def _named(kind: Any) -> str:
    return getattr(kind, "__name__", None) or str(kind).replace("collections.abc.", "").replace("typing.", "")
