"""Weights with all that is known of them, whatever file they lie in: smalto's, safetensors, or the authors'."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.errors import InputError
from smalto.tasks.checkpoint import network_state, read_checkpoint, with_prefix
from smalto.tasks.contents import CONFIG_KEY, EMA_KEY, OFFICIAL_KEY, about_export, about_run, network_node
from smalto.tasks.integrity import verified
from smalto.tasks.network import shell
from smalto.tasks.official import (
    USAGE_QUEUE,
    arguments,
    has_both,
    kind_of,
    official_name,
    official_weights,
    which_weights,
)
from smalto.tasks.official_config import Hints, discriminator_node, gpt_node, task_node, tokenizer_node
from smalto.tasks.registry import factory
from smalto.tasks.safetensors import SUFFIX, read_safetensors
from smalto.tasks.sharded_folder import is_folder
from smalto.tasks.torch_file import read_torch_file

log = logging.getLogger(__name__)

RECORD_KEY = "smalto_export"
"""Where an exported file in the authors' layout keeps what their layout has no place for; their code ignores it."""


@dataclass(frozen=True)
class Weights:
    """A network, not built: its config and its tensors by our names, mapped from the file.

    Args:
        kind: ``gpt`` or ``tokenizer``.
        state: of the network.
        config: of the run; ``config["task"]["net"]`` builds the network.
        step: of training.
        classes: names, maybe none.
        tokenizer_config: of the tokenizer a generator carries.
        tokenizer: its tensors.
        discriminator: tensors of a tokenizer's discriminator.
        official: buffers of the authors' code that ours has no use for, by their names.
    """

    kind: str
    state: dict[str, Tensor]
    config: dict[str, Any]
    step: int = 0
    classes: list[str] = field(default_factory=list)
    tokenizer_config: dict[str, Any] | None = None
    tokenizer: dict[str, Tensor] = field(default_factory=dict)
    discriminator: dict[str, Tensor] = field(default_factory=dict)
    official: dict[str, Tensor] = field(default_factory=dict)

    @property
    def net(self) -> dict[str, Any]:
        """Config node of the network."""
        return self.config["task"]["net"]


def read_weights(path: str | Path, *, hints: Hints, which: str | None = None, verify: bool = True) -> Weights:
    """Weights of any file that holds a tokenizer or a generator, checked against the network they are for.

    Args:
        path: a checkpoint of smalto, a ``.safetensors`` file, or a file of the authors.
        hints: what the authors' files do not tell.
        which: ``ema`` or ``model``; None: of smalto's files the average if there is one, of the authors' ``model``.
            Of two it is said which was taken, and the config has it as ``weights``.
        verify: compare the weights with the checksums in the file.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: another kind of file, damage, hints missing or contradicted by the file, tensors that do not fit.
    """
    path = Path(path)
    content: Any
    if is_folder(path) or (path.suffix == SUFFIX and path.with_suffix(".json").exists()):
        content = read_checkpoint(path, ema=which != "model", verify=verify)
    else:
        content = read_safetensors(path) if path.suffix == SUFFIX else read_torch_file(path)
    if isinstance(content, dict) and CONFIG_KEY in content:
        weights = _of_smalto(content, which=which, path=path)
    else:
        weights = _of_authors(content, hints=hints, which=which, path=path)
    check_fit(network_node(weights.config, path), weights.state, path, kind=weights.kind)
    if weights.tokenizer_config:
        check_fit(weights.tokenizer_config, weights.tokenizer, path, kind="tokenizer")
    parts = (weights.state, weights.tokenizer, weights.discriminator, weights.official)
    with verified(path, [tensor for part in parts for tensor in part.values()], verify=verify):
        pass
    return weights


def _of_smalto(checkpoint: dict[str, Any], *, which: str | None, path: Path) -> Weights:
    averaged = EMA_KEY in (checkpoint.get("callbacks") or {})
    if which == "ema" and not averaged:
        raise InputError(f"{path} has no averaged weights; use weights=model")
    taken = which or ("ema" if averaged else "model")
    if which is None and averaged:
        log.info("%s holds averaged and trained weights: taking the average (weights=model: the trained ones)", path)
    entry, state = about_run(checkpoint, path), checkpoint["state_dict"]
    config: dict[str, Any] = entry["config"]
    return Weights(
        kind=entry["kind"],
        state=network_state(checkpoint, ema=taken == "ema"),
        config=config | ({"weights": taken} if averaged else {}),
        step=checkpoint.get("global_step") or 0,
        classes=entry.get("classes") or [],
        tokenizer_config=checkpoint.get("tokenizer_config"),
        tokenizer=with_prefix(state, "tokenizer."),
        discriminator=with_prefix(state, "discriminator."),
        official=checkpoint.get(OFFICIAL_KEY) or {},
    )


def _of_authors(content: Any, *, hints: Hints, which: str | None, path: Path) -> Weights:
    taken = which or which_weights(content)
    if which is None and has_both(content):
        log.info("%s holds model and ema: taking model, as the authors' samplers do (weights=ema: the average)", path)
    given = official_weights(content, which=taken, path=path)
    kind = kind_of(given, path)
    record = about_export(content.get(RECORD_KEY), path)
    hints = completed(hints, arguments(content), kind, path, told=bool(record))
    official = {USAGE_QUEUE: given.pop(USAGE_QUEUE)} if USAGE_QUEUE in given else {}
    discriminator = _discriminator(content)
    if record:
        config = record["config"]
    else:
        net = (gpt_node if kind == "gpt" else tokenizer_node)(given, hints, path)
        judge = discriminator_node(discriminator, path) if discriminator else None
        size = hints.image_size or net.get("image_size")
        config = {"name": "converted", "kind": kind, "image_size": size, "task": task_node(kind, net, judge)}
        if judge:
            check_fit(judge, discriminator, path, kind="discriminator")
    theirs = check_fit(network_node(config, path), given, path, kind=kind, official=True)
    steps = content.get("steps")
    return Weights(
        kind=kind,
        state={ours: given[name] for ours, name in theirs.items()},
        config=config | {"weights": taken},
        step=record.get("step") or (steps if type(steps) is int else 0),
        classes=record.get("classes") or [],
        discriminator=discriminator,
        official=official,
    )


def completed(hints: Hints, known: dict[str, Any], kind: str, path: Path, *, told: bool) -> Hints:
    """Hints with what the file says of itself: the arguments of its training, and its name.

    Args:
        hints: of the user.
        known: the arguments.
        kind: ``gpt`` or ``tokenizer``, which fits every resolution.
        path: of the file.
        told: whether its config is in it, which knows better.

    Raises:
        InputError: both say something, and not the same.
    """
    if told:
        return hints
    named = re.search(r"(?<!\d)(256|384|512)(?!\d)", path.name)
    sources = [
        ("image_size", "the arguments of its training say", known.get("image_size")),
        ("image_size", "its name says", int(named[1]) if named and kind == "gpt" else None),
        ("downsample_factor", "the arguments of its training say", known.get("downsample_size")),
        ("l2_norm", "the arguments of its training say", known.get("codebook_l2_norm")),
    ]
    if kind == "tokenizer":
        sources = [source for source in sources if source[0] == "l2_norm" or hints.image_size is None]
    problems = [
        f"{key} is {getattr(hints, key)}, {who} {value}"
        for key, who, value in sources
        if value is not None and getattr(hints, key) not in (None, value)
    ]
    if problems and not hints.force:
        raise InputError(f"{path}: {'; '.join(problems)}; leave it out, or give force=true if the file is wrong")
    for key, who, value in sources[:1] + sources[2:]:  # a name is good for doubts, not for a number
        if value is not None and getattr(hints, key) is None:
            log.info("%s=%s: %s so in %s", key, value, who, path)
            found: dict[str, Any] = {key: value}
            hints = replace(hints, **found)
    return hints


def _discriminator(content: dict[str, Any]) -> dict[str, Tensor]:
    found = content.get("discriminator")
    if not isinstance(found, dict):
        return {}
    return {str(key).removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}


def check_fit(
    node: dict[str, Any], given: Mapping[str, Tensor], path: Path, *, kind: str, official: bool = False
) -> dict[str, str]:
    """Compare tensors with the network of a config, built without memory.

    Returns:
        Our names to the names in ``given``.

    Raises:
        ValueError: every unknown, missing and mis-shaped tensor.
    """
    where = f"the config in {path}"
    built = shell(factory(node, kind, where=where, layers=len(given)), where).state_dict()
    names = {ours: official_name(kind, ours) if official else ours for ours in built}
    wanted = {names[ours]: tuple(tensor.shape) for ours, tensor in built.items()}
    problems = [
        f"{what}: {', '.join(found)}"
        for what, found in (
            ("unknown", sorted(given.keys() - wanted.keys())),
            ("missing", sorted(wanted.keys() - given.keys())),
            (
                "of another shape",
                [
                    f"{name} {tuple(given[name].shape)} instead of {shape}"
                    for name, shape in wanted.items()
                    if name in given and tuple(given[name].shape) != shape
                ],
            ),
        )
        if found
    ]
    if problems:
        raise InputError(f"{path} does not fit the {kind} that its tensors are said to be; {'; '.join(problems)}")
    return names


def downsample_factor(tokenizer: dict[str, Any]) -> int:
    """Pixels per code along a side, of a tokenizer's config node."""
    return 2 ** (len(tokenizer["channel_multipliers"]) - 1)


def with_tokenizer(weights: Weights, tokenizer: Weights, *, paths: tuple[Path, Path]) -> Weights:
    """A generator that carries a tokenizer, at the generator's resolution.

    Raises:
        ValueError: they do not speak the same codes.
    """
    generator, given = paths
    side = weights.net["code_shape"][0][0]
    node = tokenizer.net | {"image_size": side * downsample_factor(tokenizer.net)}
    size = node["quantizer"]["codebook_size"]
    if size != weights.net["vocab_size"]:
        raise InputError(
            f"{given} has {size} codes, {generator} was trained on {weights.net['vocab_size']}; give the tokenizer "
            "whose codes it was trained on"
        )
    return replace(weights, tokenizer_config=node, tokenizer=tokenizer.state)
