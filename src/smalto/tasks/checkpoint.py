"""Reading checkpoints: a Lightning checkpoint with the resolved config of its run inside.

A checkpoint is a file, or the folder that ``strategy=fsdp`` writes. Both are read with ``weights_only=True``, and the
config in them is data, from which only what stands in :mod:`smalto.tasks.registry` is built: loading runs no code that
a file brings along, and takes no memory but for the weights that the file has.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.initial import share_of
from smalto.nn.layout import lay_out
from smalto.tasks.contents import CONFIG_KEY, EMA_KEY, OFFICIAL_KEY, about_run, check_plain, network_node, section
from smalto.tasks.integrity import verified
from smalto.tasks.network import differences, empty, network_for
from smalto.tasks.registry import factory
from smalto.tasks.safetensors import SUFFIX, read_safetensors
from smalto.tasks.sharded_folder import Place, is_folder, read_folder
from smalto.tasks.torch_file import read_torch_file
from smalto.types import CodeShape


def read_checkpoint(
    path: str | Path, *, kind: str | None = None, ema: bool | None = None, verify: bool = True
) -> dict[str, Any]:
    """The checkpoint as a dict, tensors mapped from the file and only read when used.

    Args:
        path: the file; a ``.safetensors`` file has its config in the ``.json`` beside it. Or a folder: what is wanted
            of it is read here, the optimizer's state and other tensors are on the meta device.
        kind: ``tokenizer`` or ``gpt`` if only that will do.
        ema: which weights of a folder are wanted, averaged ones where there are any or those of the training; None
            reads both.
        verify: compare what is read of a folder with its checksums; whoever reads tensors of a file does that with
            :func:`smalto.tasks.integrity.verified`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not a checkpoint of smalto, or of another kind.
    """
    path = Path(path)
    if is_folder(path):
        checkpoint = _read_sharded(path, ema=ema, verify=verify)
    else:
        checkpoint = _read_exported(path) if path.suffix == SUFFIX else read_torch_file(path)
    found = about_run(checkpoint, path)["kind"]
    if kind is not None and found != kind:
        raise InputError(f"{path} holds a {found}, a {kind} is needed here")
    return checkpoint


def _read_sharded(path: Path, *, ema: bool | None, verify: bool) -> dict[str, Any]:
    shapes = read_folder(path, wanted=lambda place: False, verify=verify)
    averaged = _shadow(shapes).keys() if ema else ()

    def wanted(place: Place) -> bool:
        match place:
            case ("state_dict", str(name)):
                return name.removeprefix("net.") not in averaged
            case ("callbacks", str(key), "shadow", _) if key == EMA_KEY:
                return ema is not False
        return False

    return read_folder(path, wanted=wanted, verify=verify)


def _shadow(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    return section(checkpoint, "callbacks", EMA_KEY, "shadow")


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
        if not beside.is_file():
            raise InputError("it is no plain file")
        checkpoint = json.loads(beside.read_text())
        check_plain(checkpoint, 0)
        if not isinstance(checkpoint, dict):
            raise InputError("it holds no object")
    except (ValueError, RecursionError) as error:
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


def start_from(task: Any, path: str | Path, *, kind: str, discriminator: bool = False) -> None:
    """Give a task's network the weights of a checkpoint, averaged ones if there are any, and nothing else of it.

    Args:
        task: with its networks built.
        path: of the checkpoint.
        kind: ``tokenizer`` or ``gpt``.
        discriminator: its weights and running statistics, too.

    Raises:
        ValueError: they are of another model, or there is no discriminator; all names are told, no weight is changed.
    """
    checkpoint = read_checkpoint(path, kind=kind, ema=True, verify=task.verify)
    given = network_state(checkpoint, ema=True)
    judge = with_prefix(checkpoint["state_dict"], "discriminator.") if discriminator else {}
    if discriminator:
        if not judge:
            raise InputError(
                f"init_from={path} holds no discriminator; set task.init_discriminator=false to begin with a new one"
            )
        wrong = differences(task.discriminator.state_dict(), judge)
        if wrong:
            raise InputError(
                f"the discriminator in init_from={path} is not that of this run: {'; '.join(wrong)}; choose "
                "discriminator= as it was trained, or task.init_discriminator=false to begin with a new one"
            )
    with verified(path, [*given.values(), *judge.values()], verify=task.verify):
        load_strictly(task.net, given, f"init_from={path} does not fit the {kind} of this run")
        if judge:
            load_strictly(task.discriminator, judge, f"the discriminator in init_from={path} does not fit")


def load_strictly(net: nn.Module, given: dict[str, Tensor], what: str) -> None:
    """Load all weights or none; of a sharded network each process takes its share.

    Raises:
        ValueError: ``what``, then every name that is missing, unknown or of another shape.
    """
    own = net.state_dict()
    wrong = differences(own, given)
    if wrong:
        raise InputError(f"{what}: {'; '.join(wrong)}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(share_of(given[name], value))


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


def load_tokenizer(
    path: str | Path, *, image_size: int | None = None, ema: bool = True, verify: bool = True
) -> LoadedTokenizer:
    """The tokenizer of a checkpoint, frozen.

    Args:
        path: a checkpoint of ``task=tokenizer``.
        image_size: use it at another resolution than it was trained at.
        ema: take the averaged weights when there are any.
        verify: compare the weights with their checksums.
    """
    checkpoint = read_checkpoint(path, kind="tokenizer", ema=ema, verify=verify)
    config = dict(network_node(checkpoint[CONFIG_KEY]["config"], Path(path)))
    if image_size is not None:
        config["image_size"] = image_size
    state = network_state(checkpoint, ema=ema)
    with verified(path, state.values(), verify=verify):
        tokenizer = empty(network_for(state, config, "tokenizer", Path(path)))
        load_strictly(tokenizer, state, f"{path} is not whole")
    return LoadedTokenizer(lay_out(tokenizer.eval().requires_grad_(False)), config, Path(path))


@dataclass(frozen=True)
class LoadedTask:
    """A task in eval mode, ready to sample or reconstruct."""

    task: Any
    kind: str
    config: dict[str, Any]
    step: int
    classes: list[str]


def load_task(
    path: str | Path, *, tokenizer_ckpt: str | Path | None = None, ema: bool = True, verify: bool = True
) -> LoadedTask:
    """The task of a checkpoint with its weights, a GPT with its tokenizer.

    Args:
        path: a checkpoint of ``smalto train``.
        tokenizer_ckpt: for a GPT that was trained without one.
        ema: take the averaged weights when there are any.
        verify: compare the weights with their checksums.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, ema=ema, verify=verify)
    about, state = checkpoint[CONFIG_KEY], network_state(checkpoint, ema=ema)
    kind, config = about["kind"], about["config"]
    inside = checkpoint.get("tokenizer_config") if kind == "gpt" and tokenizer_ckpt is None else None
    carried = with_prefix(checkpoint["state_dict"], "tokenizer.") if inside else {}
    with verified(path, [*state.values(), *carried.values()], verify=verify):
        shell = network_for(state, network_node(config, path), kind, path)
        make = factory(config["task"], f"task of a {kind}", where=f"the config in {path}")
        given: dict[str, Any] = {"tokenizer_ckpt": tokenizer_ckpt} if kind == "gpt" else {}
        # A generator's task gives its model memory itself.
        task = make(net=lambda: shell if kind == "gpt" else empty(shell), optimizer=torch.optim.SGD, **given)
        task.verify = verify
        task.configure_model()
        load_strictly(task.net, state, f"{path} is not whole")
        if inside:
            tokenizer = empty(network_for(carried, inside, "tokenizer", path))
            load_strictly(tokenizer, carried, f"the tokenizer in {path}")
            task.attach_tokenizer(tokenizer, inside)
    step = checkpoint.get("global_step") or 0
    return LoadedTask(task.eval().requires_grad_(False), kind, config, step, about.get("classes") or [])
