"""Reading checkpoints: a Lightning checkpoint with the resolved config of its run inside.

Files are read with ``weights_only=True``: loading never runs code that a file brings along.
"""

import hashlib
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from smalto.types import CodeShape

CONFIG_KEY = "smalto"
"""Entry of a checkpoint that holds ``{"version", "kind", "config"}`` as plain data."""
EMA_KEY = "EMA"
"""Callback state that holds averaged weights, ``{"shadow": {name: tensor}, ...}``."""


def read_checkpoint(path: str | Path, *, kind: str | None = None) -> dict[str, Any]:
    """The checkpoint as a dict, tensors mapped from the file and only read when used.

    Args:
        path: the file.
        kind: ``tokenizer`` or ``gpt`` if only that will do.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint of smalto, or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, a checkpoint file is needed, for instance {path}/checkpoints/last.ckpt")
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist; train one with smalto train, or check the path")
    if not is_zipfile(path):
        raise ValueError(
            f"{path} is not a torch checkpoint (not a zip archive: truncated, or another kind of file); copy it again"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} could not be read as a checkpoint: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or CONFIG_KEY not in checkpoint:
        raise ValueError(f"{path} carries no smalto config; only checkpoints written by smalto train can be used here")
    found = checkpoint[CONFIG_KEY]["kind"]
    if kind is not None and found != kind:
        raise ValueError(f"{path} holds a {found}, a {kind} is needed here")
    return checkpoint


def _network_state(checkpoint: dict[str, Any], *, ema: bool) -> dict[str, Tensor]:
    """Weights of ``task.net``, averaged ones where there are any."""
    state = _with_prefix(checkpoint["state_dict"], "net.")
    if ema:
        state |= checkpoint.get("callbacks", {}).get(EMA_KEY, {}).get("shadow", {})
    return state


def _with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def build_network(node: dict[str, Any]) -> nn.Module:
    """A network from its ``_partial_`` config node."""
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
    checkpoint = read_checkpoint(path, kind="tokenizer")
    config = dict(checkpoint[CONFIG_KEY]["config"]["task"]["net"])
    if image_size is not None:
        config["image_size"] = image_size
    tokenizer = build_network(config)
    tokenizer.load_state_dict(_network_state(checkpoint, ema=ema))
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
    checkpoint = read_checkpoint(path)
    kind, config = checkpoint[CONFIG_KEY]["kind"], checkpoint[CONFIG_KEY]["config"]
    node = dict(config["task"])
    if kind == "gpt":
        node["tokenizer_ckpt"] = tokenizer_ckpt
    else:
        node["discriminator"] = None  # only its training needs it
    task = instantiate(node, _convert_="all")
    task.configure_model()
    task.net.load_state_dict(_network_state(checkpoint, ema=ema))
    if kind == "gpt" and tokenizer_ckpt is None and checkpoint.get("tokenizer_config"):
        tokenizer = build_network(checkpoint["tokenizer_config"])
        tokenizer.load_state_dict(_with_prefix(checkpoint["state_dict"], "tokenizer."))
        task.attach_tokenizer(tokenizer, checkpoint["tokenizer_config"])
    classes = checkpoint[CONFIG_KEY].get("classes") or []
    return LoadedTask(task.eval().requires_grad_(False), kind, config, checkpoint["global_step"], classes)
