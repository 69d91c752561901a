"""Weights to files: a checkpoint of smalto, safetensors with a config beside it, the authors' layout."""

import logging
from pathlib import Path
from typing import Any

import torch

from smalto import __version__
from smalto.files import write_json
from smalto.tasks.contents import CONFIG_KEY, OFFICIAL_KEY
from smalto.tasks.official import USAGE_QUEUE, USAGE_QUEUE_LENGTH, official_name
from smalto.tasks.safetensors import write_safetensors
from smalto.tasks.torch_file import write_torch_file
from smalto.tasks.weights import RECORD_KEY, Weights

log = logging.getLogger(__name__)


def write_weights(weights: Weights, path: Path, *, layout: str) -> list[Path]:
    """Write weights at once, as ``smalto`` (a checkpoint), ``safetensors`` (and a JSON file) or ``official``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "official":
        write_torch_file(path, official_layout(weights))
        return [path]
    entry = {"version": __version__, "kind": weights.kind, "config": weights.config, "classes": weights.classes}
    head = {CONFIG_KEY: entry, "global_step": weights.step, "tokenizer_config": weights.tokenizer_config}
    parts = (("net", weights.state), ("tokenizer", weights.tokenizer), ("discriminator", weights.discriminator))
    state = {f"{part}.{name}": tensor for part, tensors in parts for name, tensor in tensors.items()}
    if layout == "smalto":
        write_torch_file(path, head | {"state_dict": state, "callbacks": {}, OFFICIAL_KEY: weights.official})
        return [path]
    state |= {f"{OFFICIAL_KEY}.{name}": tensor for name, tensor in weights.official.items()}
    write_json(path.with_suffix(".json"), head)
    write_safetensors(path, state)
    return [path, path.with_suffix(".json")]


def official_layout(weights: Weights) -> dict[str, Any]:
    """The content of a file that the authors' scripts load, strictly."""
    model = {official_name(weights.kind, name): tensor for name, tensor in weights.state.items()}
    if weights.kind == "tokenizer":
        model[USAGE_QUEUE] = weights.official.get(USAGE_QUEUE, torch.zeros(USAGE_QUEUE_LENGTH))
    for problem in beyond_authors(weights.net):
        log.warning("the authors' code cannot run this model as it was trained: %s", problem)
    record = {"config": weights.config, "classes": weights.classes, "step": weights.step}
    content: dict[str, Any] = {"model": model, "steps": weights.step, RECORD_KEY: record}
    if weights.discriminator:
        content["discriminator"] = weights.discriminator
    return content


def beyond_authors(net: dict[str, Any]) -> list[str]:
    """Settings of a network that the authors' code has fixed otherwise."""
    fixed = {"norm_groups": 32, "base_channels": 128, "num_res_blocks": 2, "condition_rope": "zero"}
    found = [f"{key} is {net[key]}, theirs {value}" for key, value in fixed.items() if net.get(key, value) != value]
    if any(rows != columns for rows, columns in net.get("code_shape", [])):
        found.append("its grid is not square")
    return found
