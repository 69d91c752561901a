"""One ``smalto evaluate`` on its way: what it measures, where it keeps it, and what decides its numbers."""

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from smalto.data.ranks import Ranks
from smalto.errors import InputError
from smalto.metrics.reference import Kind
from smalto.runtime import results_folder, wanted_device
from smalto.tasks.checkpoint import LoadedTask
from smalto.tasks.contents import section
from smalto.tasks.registry import factory

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One evaluation on its way.

    Args:
        config: of the command.
        ranks: the processes.
        loaded: the checkpoint; None for images made elsewhere.
        requested: everything that decides the numbers.
        protocol: the same for people, filled while measuring.
    """

    config: DictConfig
    ranks: Ranks
    loaded: LoadedTask | None
    requested: dict[str, Any]
    protocol: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What is compared with what, see `Reference`."""
        if self.loaded is not None:
            return "generation" if self.loaded.kind == "gpt" else "reconstruction"
        return self.config.kind or "generation"

    @property
    def name(self) -> str:
        """Of the MLflow experiment."""
        what = self.loaded.kind if self.loaded else "samples" if self.config.samples else "reference"
        return f"evaluate_{what}"

    @property
    def key(self) -> str:
        """Of the numbers: two evaluations of one thing by two protocols stand side by side."""
        return hashlib.sha256(json.dumps(self.requested, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def out(self) -> Path:
        """The JSON file."""
        config = self.config
        if config.out:
            return Path(config.out)
        if self.loaded is not None:
            return results_folder(config.ckpt) / f"evaluation_step{self.loaded.step}_{self.key}.json"
        return (
            Path(config.paths.outputs)
            / "evaluations"
            / f"{Path(config.samples or config.reference).stem}_{self.key}.json"
        )

    @property
    def part_dir(self) -> Path:
        """For what is finished before the whole is."""
        return self.out.with_name(f"{self.out.stem}.part-{self.key}")

    @property
    def device(self) -> torch.device:
        """Where this process works."""
        wanted = wanted_device(self.config.device)
        return (
            torch.device("cuda", self.ranks.local_rank)
            if wanted.type == "cuda" and self.ranks.world_size > 1
            else wanted
        )

    @property
    def save(self) -> Path | None:
        """Folder for the images that are measured."""
        return Path(self.config.save) if self.config.save else None


def reference_images(job: Job) -> tuple[Path, int | None]:
    """Where the real images are, and the side they are cropped to: of ``reference``, or of the checkpoint's run."""
    config, loaded = job.config, job.loaded
    size = config.image_size if loaded is None else decoder(loaded).image_size
    if config.reference is not None:
        return Path(config.reference), size
    assert loaded is not None
    places = ("data",) if loaded.kind == "tokenizer" else ("callbacks", "generation", "reference")
    path = section(loaded.config, *places).get("path")
    if not isinstance(path, str) or not path:
        raise InputError(f"{config.ckpt} knows of no reference images; give reference=IMAGES: a folder, .npz or shards")
    return Path(path), size


def requested(config: DictConfig) -> dict[str, Any]:
    """All settings that decide the numbers; what is in the files they name is added by `smalto.evaluate`."""
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for key in ("paths", "out", "device", "mlflow", "overwrite", "batch_size", "save", "verify"):
        plain.pop(key)
    return plain


def decoder(loaded: LoadedTask) -> Any:
    """What makes pictures: the network of a tokenizer, the tokenizer of a generator."""
    found = loaded.task.tokenizer if loaded.kind == "gpt" else loaded.task.net
    if found is None:
        raise InputError("this generator carries no tokenizer; give tokenizer_ckpt=PATH to see pictures")
    return found


def code_shards(loaded: LoadedTask) -> Any:
    """The codes the generator was trained on, None if they are gone."""
    node = section(loaded.config, "data")
    if not node:
        log.warning("no validation loss: the checkpoint does not say on which codes it was trained")
        return None
    if node.get("_target_") != "smalto.data.codes.CodeShards":
        log.warning("no validation loss: of a checkpoint's data only shards of codes are read (smalto extract)")
        return None
    data = factory(node, "codes", where="the config in the checkpoint")()
    try:
        data.setup("validate")
    except FileNotFoundError as error:
        log.warning("no validation loss: %s", error)
        return None
    return data
