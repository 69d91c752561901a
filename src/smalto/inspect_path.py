"""``smalto inspect``: what is in a folder of shards or codes, in a checkpoint, in a run, and whether it is whole."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from smalto.analysis.shard_facts import Facts, code_facts, code_statistics, image_facts, label_statistics
from smalto.callbacks.checkpoint import newest_checkpoint, step_checkpoints
from smalto.data.codes import CodeReader
from smalto.data.health import shard_meta, shard_problems
from smalto.data.meta import meta_problems, read_json
from smalto.data.reader import ImageReader
from smalto.data.shards import CODES
from smalto.data.transforms import center_crop, to_uint8
from smalto.errors import InputError, MissingFile, printable
from smalto.runtime import hydra_main
from smalto.sampling.sheet import image_sheet
from smalto.tasks.checkpoint import load_tokenizer, read_checkpoint
from smalto.tasks.contents import EMA_KEY, about_run, check_plain, section
from smalto.tasks.integrity import all_tensors, verified
from smalto.tasks.sharded_folder import folder_bytes, is_folder, read_folder

log = logging.getLogger(__name__)

MOST_PIXELS = 2048
"""Side of images that are decoded from codes."""
MOST_SETTINGS = 2**20
"""Bytes of a config.yaml, or of another short file of a run; they have some thousand."""


def run(config: DictConfig) -> Facts:
    """Show what is at ``path``; the facts by name.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: nothing of smalto's, or something of it is damaged (said after the table).
    """
    path = Path(config.path or "")
    if not config.path:
        raise InputError("path is empty; give a folder of shards or codes, a checkpoint, or a run folder")
    if not path.exists():
        raise MissingFile(f"nothing at {path}; give a folder of shards or codes, a checkpoint, or a run folder")
    meta = shard_meta(path)
    picture: Tensor | None = None
    if meta is not None:
        problems = shard_problems(path, meta, verify=config.verify)
        facts: Facts = {"what": "shards"}
        if not meta_problems(meta):
            facts = code_facts(path, meta) if meta["format"] == CODES else image_facts(path, meta)
        if not problems:
            facts |= code_statistics(path, meta) if meta["format"] == CODES else label_statistics(path, meta)
            picture = (
                decoded_codes(config, path, meta) if meta["format"] == CODES else stored_images(config, path, meta)
            )
        checked = "every hash" if config.verify else "names and sizes (verify=true compares hashes)"
    elif path.is_file() or is_folder(path):
        facts, problems = checkpoint_facts(path, verify=config.verify)
        checked = "every checksum, every weight" if config.verify else "readable (verify=true reads all weights)"
    elif (path / "config.yaml").is_file():
        facts, problems = run_facts(path)
        checked = "checkpoints are whole files"
    else:
        begun = " (it holds an unfinished job: run the same command again)" if (path / "plan.json").exists() else ""
        raise InputError(f"{path} is neither a finished set of shards or codes nor a run folder{begun}")
    facts["health"] = "; ".join(problems) if problems else f"good, checked: {checked}"
    if picture is not None:
        out = Path(config.picture or f"{config.paths.outputs}/inspect/{path.resolve().name}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        image_sheet(picture, columns=config.columns).save(out, format="PNG")
        facts["picture"] = str(out)
    show(facts, title=f"{path}")
    if problems:
        raise InputError(f"{path} is damaged: {'; '.join(problems)}")
    return facts


def checkpoint_facts(path: Path, *, verify: bool) -> tuple[Facts, list[str]]:
    """Of a checkpoint; problems: weights that are no finite numbers, with ``verify``.

    Raises:
        InputError: none, or with ``verify`` one whose checksums differ.
    """
    sharded = is_folder(path)
    checkpoint = read_folder(path, wanted=lambda place: verify, verify=verify) if sharded else read_checkpoint(path)
    with verified(path, all_tensors(checkpoint), verify=verify):
        pass
    about, state = about_run(checkpoint, path), checkpoint["state_dict"]
    sizes: dict[str, int] = {}
    for name, tensor in state.items():
        sizes[name.split(".")[0]] = sizes.get(name.split(".")[0], 0) + tensor.numel()
    size = folder_bytes(path) if sharded else path.stat().st_size
    averaged = EMA_KEY in section(checkpoint, "callbacks")
    facts = {
        "what": f"checkpoint of a {about['kind']}",
        "folder" if sharded else "file": f"{size / 2**20:,.1f} MiB, smalto {about.get('version')}",
        "step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "averaged weights": "yes" if averaged else "no",
        "optimizer": "yes, training can go on" if checkpoint.get("optimizer_states") else "no",
        "classes": len(about.get("classes") or []),
        "network": json.dumps(_plain_options(section(about["config"], "task", "net")), default=str),
        "parameters and buffers": {name: f"{count:,}" for name, count in sizes.items()},
    }
    data = section(about["config"], "data")
    if data:
        facts["data"] = str(data.get("path", data.get("_target_")))
    problems = []
    if verify:
        broken = [n for n, t in state.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if not sharded:
            with path.open("rb") as file:
                facts["SHA-256"] = hashlib.file_digest(file, "sha256").hexdigest()
        problems = [f"{len(broken)} tensors hold NaN or infinity, the first is {broken[0]}"] if broken else []
    return facts, problems


def run_facts(path: Path) -> tuple[Facts, list[str]]:
    """Of a run folder; problems: checkpoints cut short."""
    try:
        config, origin, metrics = (_plain(path / name) for name in ("config.yaml", "provenance.json", "metrics.json"))
    except (ValueError, RecursionError, OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no run of smalto, or damaged: {' '.join(str(error).split())[:300]}") from error
    checkpoints = step_checkpoints(path / "checkpoints")
    newest = newest_checkpoint(path / "checkpoints")
    data = section(config, "data")
    facts: Facts = {
        "what": f"run of {config.get('name')}, task {config.get('kind')}",
        "state": "finished" if metrics else "unfinished; the same command, or make resume, goes on",
        "checkpoints": ", ".join(p.name for p in checkpoints) or "none",
        "newest": str(newest),
        "data": str(data.get("path", data.get("_target_"))),
        "batch size": data.get("batch_size"),
    }
    if origin:
        facts |= {"commit": origin.get("commit"), "command": origin.get("command")}
    if metrics:
        numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        facts["metrics"] = {key: f"{float(value):.4g}" for key, value in numbers.items()}
    damaged = [p.name for p in checkpoints if newest is None or p.name > newest.name]
    return facts, [f"{name} is cut short" for name in damaged]


def _plain(file: Path) -> dict[str, Any]:
    """What a YAML or JSON file says; empty where there is none."""
    if not file.exists():
        return {}
    if file.stat().st_size > MOST_SETTINGS:
        raise ValueError(f"{file.name} has {file.stat().st_size:,} bytes, which no settings take")
    content = yaml.load(file.read_text(), _Plain) if file.suffix == ".yaml" else read_json(file)
    check_plain(content, 0)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no settings")
    return content


class _Plain(yaml.SafeLoader):
    """Without the key << by which a few lines become any number of entries."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "it merges entries", node.start_mark)


def stored_images(config: DictConfig, path: Path, meta: dict[str, Any]) -> Tensor | None:
    """The first images, as squares: uint8 (N, 3, S, S)."""
    split = "train" if "train" in meta["splits"] else next(iter(meta["splits"]))
    reader = ImageReader(path, meta, split)
    images = [reader.read(i) for i in range(min(config.num_images, len(reader)))]
    if not images:
        return None
    size = min(config.image_size, max(max(image.size) for image in images))
    pixels = np.stack([np.asarray(center_crop(image, size)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@torch.inference_mode()
def decoded_codes(config: DictConfig, path: Path, meta: dict[str, Any]) -> Tensor | None:
    """The first images as the tokenizer rebuilds them from their codes; None when it is not at hand."""
    written = section(meta, "tokenizer")
    named = config.tokenizer_ckpt or written.get("path")
    file = Path(named) if isinstance(named, str) else Path()
    if not file.is_file():
        log.info("no picture: the tokenizer %s is not there; give tokenizer_ckpt=PATH", file)
        return None
    size = meta.get("image_size")
    if size is not None and not (isinstance(size, int) and size <= MOST_PIXELS):
        log.warning("no picture: images of %s px are too large to decode a dozen of them", size)
        return None
    loaded = load_tokenizer(file, image_size=size)
    shape = [list(scale) for scale in loaded.code_shape]
    if (shape, loaded.codebook_size) != (meta["code_shape"], meta["codebook_size"]):
        log.warning("no picture: %s has %d codes in grids %s", file, loaded.codebook_size, shape)
        return None
    if loaded.fingerprint != written.get("fingerprint"):
        log.warning("no picture: %s has other weights than those that wrote the codes; give tokenizer_ckpt=PATH", file)
        return None
    reader = CodeReader(path, meta, "train" if "train" in meta["splits"] else next(iter(meta["splits"])))
    indices = np.arange(min(config.num_images, len(reader)))
    codes = torch.from_numpy(reader.gather(indices, np.zeros(len(indices), np.int64)))
    return to_uint8(torch.cat([loaded.tokenizer.decode(part) for part in codes.split(16)]))


def show(facts: Facts, *, title: str) -> None:
    """The table, to stdout."""
    table = Table(title=printable(title), title_justify="left", show_header=False)
    for name, value in facts.items():
        if isinstance(value, dict):
            for number, (key, entry) in enumerate(value.items()):
                table.add_row(name if number == 0 else "", printable(f"{key}: {entry}"))
        else:
            table.add_row(name, printable(str(value)))
    Console(soft_wrap=True, markup=False).print(table, highlight=False)


def _plain_options(node: dict[str, Any]) -> dict[str, Any]:
    named = ((str(key), value) for key, value in node.items())
    return {key: value for key, value in named if not key.startswith("_") and not isinstance(value, dict)}


main = hydra_main("inspect")(run)

if __name__ == "__main__":
    main()
