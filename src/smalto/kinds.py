"""Every option compared with the kind of value it takes, in one place, before anything is built from a config.

The kinds are those that constructors declare (what ``_target_`` names), those of the defaults in ``conf/VERB.yaml``,
and, where such a default is null, those of a table here. What can only be meant one way is put right (``8.0`` images
are 8, ``'1e-3'`` is a number, one label is a list of one); all else is refused by the option's name.
"""

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from smalto.arguments import expanded, is_path
from smalto.errors import InputError
from smalto.fitting import Misfit, fitted, is_plain, shown, words

OPTIONAL: dict[str, Any] = {
    **dict.fromkeys(("ckpt", "ckpt_path", "tokenizer_ckpt", "init_from", "in", "out", "path", "samples"), str),
    **dict.fromkeys(("reference", "save", "to_npy", "text", "picture", "kind", "weights", "run_dir"), str),
    **dict.fromkeys(("image_size", "eval_size", "protocol.eval_size", "limit", "reference_limit", "quality"), int),
    **dict.fromkeys(("workers", "downsample_factor", "num_heads", "plan.num_images"), int),
    **dict.fromkeys(("plan.mfu", "plan.price_per_hour", "plan.network_gb_s"), float),
    **dict.fromkeys(("crop_range", "guidance_scales", "top_ps", "temperatures"), list[float]),
    "top_ks": list[int],
    "num_samples": int | list[int],
    "labels": list[Any],
    "l2_norm": bool,
    "from_npy": str | dict,
}
"""Kinds of options at the root of a verb's config whose default is null or missing."""


NEEDED = {
    "prepare": ("source",),
    "train": ("trainer", "task", "data"),
    "plan": ("trainer", "task", "data"),
    "extract": ("data",),
    "sample": ("sampling", "engine"),
    "evaluate": ("sampling", "engine", "features", "protocol.rules"),
}
"""Nodes that a verb cannot do without."""


class Range(typing.NamedTuple):
    """Values that an option may have."""

    holds: Callable[[Any], bool]
    words: str


_AT_LEAST_0 = Range(lambda value: value >= 0, "0 or more")
_AT_LEAST_1 = Range(lambda value: value >= 1, "1 or more")
_FINITE = Range(lambda value: 0 <= value < math.inf, "0 or more, and finite")
_POSITIVE = Range(lambda value: value > 0, "more than 0")
_OR_MINUS_1 = Range(lambda value: value >= -1, "-1 (no limit) or more")
RANGES = {
    r"(.+\.)?seed": Range(lambda value: 0 <= value < 2**32, "from 0 to 4294967295"),
    r"(.+\.)?(\w+_)?batch_size|(.+\.)?image_size|shard_size|block_size|num_images|columns": _AT_LEAST_1,
    r"trainer\.(num_nodes|accumulate_grad_batches|check_val_every_n_epoch)": _AT_LEAST_1,
    r"(.+\.)?num_workers|workers|max_rejected": _AT_LEAST_0,
    r"trainer\.(log_every_n_steps|limit_\w+_batches|gradient_clip_val)": _AT_LEAST_0,
    r"task\.optimizer\.(lr|eps|weight_decay)": _FINITE,
    r"task\.optimizer\.betas": Range(lambda value: all(0 <= each < 1 for each in value), "from 0 to below 1 each"),
    r"model\.(dim|num_layers|num_heads|num_kv_heads|ffn_multiple_of)": _AT_LEAST_1,
    r"(.+\.)?(base_channels|norm_groups|z_channels)": _AT_LEAST_1,
    r"tokenizer\.num_res_blocks|(.+\.)?(codebook_size|codebook_dim|num_classes)|discriminator\.num_layers": _AT_LEAST_1,
    r"tokenizer\.channel_multipliers": Range(
        lambda value: value and min(value) >= 1, "one or more numbers of 1 or more"
    ),
    r"(.+\.)?(\w*dropout|drop_path|\w+_prob)": Range(lambda value: 0 <= value <= 1, "from 0 to 1"),
    r"guidance_scales|top_ks|top_ps|temperatures|crop_range|num_samples": Range(
        lambda value: value != [], "one or more numbers, or null"
    ),
    r"trainer\.val_check_interval": _POSITIVE,
    r"trainer\.(max_steps|max_epochs|num_sanity_val_steps)": _OR_MINUS_1,
}
"""Ranges of options that the libraries behind them would refuse without the option's name, or not at all."""


def check_kinds(config: DictConfig, *, verb: str, folder: Path) -> None:
    """Put the values of a composed config right, in place.

    Args:
        config: of a verb.
        verb: its name.
        folder: ``conf/``.

    Raises:
        InputError: naming every option whose value is of another kind, or out of range.
    """
    kinds, present = root_kinds(verb, folder), set(config.keys())  # `in` would say no of what is missing
    problems = [f"{key} is needed; ~{key} takes it away" for key in kinds if "." not in key and key not in present]
    problems += [
        "{0} is needed: {0}=CHOICE or a node of options, not ~{0} or null".format(key.partition(".")[0])
        for key in NEEDED.get(verb, ())
        if "_target_" not in (OmegaConf.select(config, key) or {})
    ]
    problems += _walk(config, "", kinds)
    if problems:
        raise InputError("; ".join(problems))


@cache
def root_kinds(verb: str, folder: Path) -> dict[str, Any]:
    """Kinds of the options outside of objects, by their full key."""
    names = {"plan": ("train", "plan"), "evaluate": ("protocol/smalto", "evaluate")}.get(verb, (verb,))
    found: dict[str, Any] = {}
    for name in names:
        defaults = OmegaConf.load(folder / f"{name}.yaml") if (folder / f"{name}.yaml").exists() else DictConfig({})
        assert isinstance(defaults, DictConfig)
        found |= dict(_kinds_of(OmegaConf.to_container(defaults), ""))
    return found


def _kinds_of(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        full = f"{prefix}{key}"
        if full in ("defaults", "hydra") or "_target_" in node:
            continue
        if isinstance(value, dict):
            yield from _kinds_of(value, f"{full}.")
        elif value is None:
            yield full, OPTIONAL[full] | None if full in OPTIONAL else Any
        elif value == "???":
            yield full, OPTIONAL.get(full, Any)
        else:
            yield full, list[Any] if isinstance(value, list) else type(value)


@dataclass(frozen=True)
class Declared:
    """What a class or function says of its arguments; nothing is known of a target that is not there.

    Attributes:
        kinds: annotations by name.
        names: of all arguments; None if it takes any.
    """

    kinds: dict[str, Any]
    names: tuple[str, ...] | None


@cache
def declared(target: str) -> Declared:
    """The arguments of what a ``_target_`` names."""
    try:
        found = get_object(target)
        signature = inspect.signature(found).parameters
        hints = typing.get_type_hints(inspect.getattr_static(found, "__init__") if isinstance(found, type) else found)
    except Exception:  # told when it is built
        return Declared({}, None)
    open_end = any(each.kind is each.VAR_KEYWORD for each in signature.values())
    return Declared(hints, None if open_end else tuple(signature))


def _walk(node: DictConfig, prefix: str, kinds: dict[str, Any]) -> Iterator[str]:
    """Put right what lies below ``node``; yields what cannot be."""
    target = None if OmegaConf.is_missing(node, "_target_") else node.get("_target_")
    arguments = declared(target) if isinstance(target, str) else None
    for key in map(str, node):
        full = f"{prefix}{key}"
        if arguments is not None and arguments.names is not None and key not in arguments.names and key[0] != "_":
            yield f"{full} is no option of {target}; it has {', '.join(arguments.names)}"
            continue
        if key.startswith("_") or OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key):
            continue
        kind = kinds.get(full, Any) if arguments is None else arguments.kinds.get(key, Any)
        value = node[key]
        if isinstance(value, DictConfig):
            if is_plain(kind) and "_target_" not in value:
                yield f"{full} is a node of options, {words(kind)} is needed"
            else:
                yield from _walk(value, f"{full}.", kinds)
            continue
        if isinstance(value, ListConfig):
            value = OmegaConf.to_container(value, resolve=False)
            if "${" in str(value):
                continue
        given = value
        if is_path(full) and isinstance(value, str):
            value = expanded(full, value)
            if not value:
                yield f"{full} is empty, a path is needed"
        try:
            value = fitted(value, kind)
        except Misfit:
            quotes = "; put it in quotes" if kind in (str, str | None) and value is not None else ""
            yield f"{full} is {shown(value)}, {words(kind)} is needed{quotes}"
            continue
        allowed = next((each for pattern, each in RANGES.items() if re.fullmatch(pattern, full)), None)
        if allowed is not None and not isinstance(value, (str, type(None))) and not allowed.holds(value):
            yield f"{full} is {shown(value)}, must be {allowed.words}"
        elif repr(value) != repr(given):
            node[key] = value
