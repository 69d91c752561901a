"""Reading checkpoints: a Lightning checkpoint with the resolved config of its run inside.

A checkpoint is a file, or the folder that ``strategy=fsdp`` writes. Both are read with ``weights_only=True``: loading
never runs code that a file brings along.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.initial import share_of
from smalto.tasks.safetensors import SUFFIX, read_safetensors
from smalto.tasks.sharded_folder import Place, is_folder, read_folder
from smalto.tasks.targets import check_targets
from smalto.tasks.torch_file import read_torch_file
from smalto.types import CodeShape

CONFIG_KEY = "smalto"
"""Entry of a checkpoint that holds ``{"version", "kind", "config"}`` as plain data."""
EMA_KEY = "EMA"
"""Callback state that holds averaged weights, ``{"shadow": {name: tensor}, ...}``."""
OFFICIAL_KEY = "official"
"""Entry with buffers of the LlamaGen authors' code, kept for the way back into their layout."""


def read_checkpoint(path: str | Path, *, kind: str | None = None, ema: bool | None = None) -> dict[str, Any]:
    """The checkpoint as a dict, tensors mapped from the file and only read when used.

    Args:
        path: the file; a ``.safetensors`` file has its config in the ``.json`` beside it. Or a folder: what is wanted
            of it is read here, the optimizer's state and other tensors are on the meta device.
        kind: ``tokenizer`` or ``gpt`` if only that will do.
        ema: which weights of a folder are wanted, averaged ones where there are any or those of the training; None
            reads both.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint of smalto, or of another kind.
    """
    path = Path(path)
    if is_folder(path):
        checkpoint = _read_sharded(path, ema=ema)
    else:
        checkpoint = _read_exported(path) if path.suffix == SUFFIX else read_torch_file(path)
    found = about_run(checkpoint, path)["kind"]
    if kind is not None and found != kind:
        raise InputError(f"{path} holds a {found}, a {kind} is needed here")
    return checkpoint


def about_run(checkpoint: Any, path: Path) -> dict[str, Any]:
    """What a checkpoint says of its run: ``version``, ``kind``, ``config``, ``classes``.

    Raises:
        ValueError: it says nothing, because smalto did not write it.
    """
    if not isinstance(checkpoint, dict) or CONFIG_KEY not in checkpoint:
        raise InputError(
            f"{path} carries no smalto config; only checkpoints written by smalto train can be used here (a file of "
            f"the LlamaGen authors becomes one by smalto convert in={path} out=NAME.ckpt)"
        )
    return checkpoint[CONFIG_KEY]


def _read_sharded(path: Path, *, ema: bool | None) -> dict[str, Any]:
    shapes = read_folder(path, wanted=lambda place: False)
    averaged = _shadow(shapes).keys() if ema else ()

    def wanted(place: Place) -> bool:
        match place:
            case ("state_dict", str(name)):
                return name.removeprefix("net.") not in averaged
            case ("callbacks", str(key), "shadow", _) if key == EMA_KEY:
                return ema is not False
        return False

    return read_folder(path, wanted=wanted)


def _shadow(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return checkpoint.get("callbacks", {}).get(EMA_KEY, {}).get("shadow", {})


def _read_exported(path: Path) -> dict[str, Any]:
    """A checkpoint that ``smalto convert format=safetensors`` wrote."""
    beside = path.with_suffix(".json")
    tensors = read_safetensors(path)
    if not beside.exists():
        raise InputError(
            f"{path} carries no smalto config: {beside.name} is missing beside it; copy that too, or make both by "
            "smalto convert in=FILE out=NAME.safetensors format=safetensors from a checkpoint of smalto train"
        )
    try:
        checkpoint = json.loads(beside.read_text())
    except ValueError as error:
        raise InputError(f"{beside} is not the JSON file of {path.name} ({error}); copy it again") from error
    official = with_prefix(tensors, f"{OFFICIAL_KEY}.")
    state = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{OFFICIAL_KEY}.")}
    return checkpoint | {"state_dict": state, "callbacks": {}, OFFICIAL_KEY: official}


def network_state(checkpoint: dict[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """Weights of ``task.net``, averaged ones where there are any."""
    state = with_prefix(checkpoint["state_dict"], "net.")
    if ema:
        state |= _shadow(checkpoint)
    return state


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def start_from(task: Any, path: str | Path, *, kind: str) -> None:
    """Give a task's network the weights of a checkpoint, averaged ones if there are any, and nothing else of it.

    Raises:
        ValueError: they are of another model; all names are told, and no weight is changed.
    """
    given = network_state(read_checkpoint(path, kind=kind, ema=True), ema=True)
    load_strictly(task.net, given, f"init_from={path} does not fit the {kind} of this run")


def load_strictly(net: nn.Module, given: dict[str, Tensor], what: str) -> None:
    """Load all weights or none; of a sharded network each process takes its share.

    Raises:
        ValueError: ``what``, then every name that is missing, unknown or of another shape.
    """
    own = net.state_dict()
    wrong = [f"{name} is missing" for name in sorted(own.keys() - given.keys())]
    wrong += [f"{name} is unknown" for name in sorted(given.keys() - own.keys())]
    wrong += [
        f"{name} is {tuple(given[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        raise InputError(f"{what}: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(share_of(given[name], value))


def build_network(node: dict[str, Any]) -> nn.Module:
    """A network from its ``_partial_`` config node.

    Raises:
        ValueError: it names something that is not part of smalto, see :mod:`smalto.tasks.targets`.
    """
    check_targets(node)
    return instantiate(node, _convert_="all")()


def fingerprint(net: nn.Module) -> str:
    """16 hex digits of the weights' SHA-256, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer in eval mode and what is known of it."""

    tokenizer: Any
    config: dict[str, Any]
    path: Path

    @property
    def codebook_size(self) -> int:
        """Entries of the codebook."""
        return self.tokenizer.codebook_size

    @property
    def code_shape(self) -> CodeShape:
        """Grid of codes of an image."""
        return self.tokenizer.code_shape

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return self.tokenizer.image_size

    @property
    def fingerprint(self) -> str:
        """Hash of the weights, see :func:`fingerprint`."""
        return fingerprint(self.tokenizer)


def load_tokenizer(path: str | Path, *, image_size: int | None = None, ema: bool = True) -> LoadedTokenizer:
    """The tokenizer of a checkpoint, frozen.

    Args:
        path: a checkpoint of ``task=tokenizer``.
        image_size: use it at another resolution than it was trained at.
        ema: take the averaged weights when there are any.
    """
    checkpoint = read_checkpoint(path, kind="tokenizer", ema=ema)
    config = dict(checkpoint[CONFIG_KEY]["config"]["task"]["net"])
    if image_size is not None:
        config["image_size"] = image_size
    tokenizer = build_network(config)
    load_strictly(tokenizer, network_state(checkpoint, ema=ema), f"{path} is not whole")
    tokenizer = tokenizer.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return LoadedTokenizer(tokenizer, config, Path(path))


@dataclass(frozen=True)
class LoadedTask:
    """A task in eval mode, ready to sample or reconstruct."""

    task: Any
    kind: str
    config: dict[str, Any]
    step: int
    classes: list[str]


def load_task(path: str | Path, *, tokenizer_ckpt: str | Path | None = None, ema: bool = True) -> LoadedTask:
    """The task of a checkpoint with its weights, a GPT with its tokenizer.

    Args:
        path: a checkpoint of ``smalto train``.
        tokenizer_ckpt: for a GPT that was trained without one.
        ema: take the averaged weights when there are any.
    """
    checkpoint = read_checkpoint(path, ema=ema)
    kind, config = checkpoint[CONFIG_KEY]["kind"], checkpoint[CONFIG_KEY]["config"]
    node = dict(config["task"])
    if kind == "gpt":
        node |= {"tokenizer_ckpt": tokenizer_ckpt, "compile": False}
    else:
        node["discriminator"] = node["perceptual"] = None
    # Only training needs these; they may need packages and files of the machine that trained.
    node["optimizer"] = {"_target_": "torch.optim.SGD", "_partial_": True}
    check_targets(node)
    task = instantiate(node, _convert_="all")
    task.configure_model()
    load_strictly(task.net, network_state(checkpoint, ema=ema), f"{path} is not whole")
    if kind == "gpt" and tokenizer_ckpt is None and checkpoint.get("tokenizer_config"):
        tokenizer = build_network(checkpoint["tokenizer_config"])
        load_strictly(tokenizer, with_prefix(checkpoint["state_dict"], "tokenizer."), f"the tokenizer in {path}")
        task.attach_tokenizer(tokenizer, checkpoint["tokenizer_config"])
    classes = checkpoint[CONFIG_KEY].get("classes") or []
    return LoadedTask(task.eval().requires_grad_(False), kind, config, checkpoint["global_step"], classes)
