"""``smalto train``: compose, build, fit. One run, one folder; the same command continues an unfinished one."""

import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from omegaconf import DictConfig, OmegaConf

from smalto.callbacks.checkpoint import (
    LatestCheckpoint,
    checkpoint_to_continue,
    discard_checkpoints,
    gone,
    step_checkpoints,
)
from smalto.callbacks.generation import Generation
from smalto.callbacks.mlflow_logger import MEMORY, WAITING, MLFlowLogger, deliver_waiting
from smalto.callbacks.provenance import Provenance
from smalto.callbacks.ranks import RankWatch, follow_parent
from smalto.callbacks.validation import NOTE, Validation
from smalto.data.ranks import leads
from smalto.errors import InputError
from smalto.files import alone_in, write_bytes
from smalto.preflight import preflight
from smalto.redact import redacted
from smalto.runtime import build, hydra_main, setup_logging
from smalto.sweeps.names import PARENT
from smalto.tasks.checkpoint import read_checkpoint
from smalto.tasks.strategy import AnyCheckpoint

log = logging.getLogger(__name__)

VOLATILE = {"paths", "overwrite", "run_dir", "logger", "debug", "verify"}
"""Root keys that may differ between a run and its continuation."""
PLACEMENT = {f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "strategy", "inference_mode")}
PLACEMENT |= {"data.verify", "trainer.benchmark", "tf32"}
"""Where a run computes may differ too: checkpoints fit every strategy, on any number of processes. And whether what is
read is verified."""


UNSET = (False, 0, "auto", "nearest")
"""What a run that was begun without an option did all the same."""


def run(config: DictConfig) -> dict[str, float]:
    """Train, or continue, what the config describes; returns the final metrics.

    Raises:
        ValueError: a setting that cannot be, or a run folder that another config already uses.
        PathInUse: another process trains there.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    folder = Path(plain["run_dir"])
    metrics = check_folder(folder, plain)
    if metrics is None:
        preflight(plain)
        with alone_in(folder) if leads() else nullcontext():
            metrics = check_folder(folder, plain)  # as the last one who worked here left it
            if metrics is None:
                return fit(config, plain, folder)
    log.info("%s is finished already (overwrite=true trains anew)", folder)
    if leads():
        deliver_waiting(folder, plain)
    return metrics


def fit(config: DictConfig, plain: dict[str, Any], folder: Path) -> dict[str, float]:
    """Train to the end what is not finished; returns the final metrics."""
    follow_parent(folder)
    setup_logging(folder / "train.log")
    L.seed_everything(plain["seed"], workers=True, verbose=False)
    data, task = build(config.data), build(config.task)
    task.verify = plain.get("verify", True)
    checkpoint, verified = plain["ckpt_path"], False
    if checkpoint in (None, "last"):
        # With overwrite, the first of several processes is about to remove what others may still see.
        checkpoint = None if plain["overwrite"] else checkpoint_to_continue(folder / "checkpoints", verify=task.verify)
        verified = checkpoint is not None and checkpoint.is_file()  # of a folder each process proves what it reads
    elif checkpoint:
        read_checkpoint(checkpoint, kind=plain["kind"], verify=False)
    claim_folder(folder, plain)
    callbacks = [build(node) for node in chosen(config.get("callbacks"))]
    validation = Validation(folder)
    callbacks += [Provenance(plain, kind=plain["kind"]), validation]
    loggers = [reopen(folder, node) for node in chosen(config.get("logger"))]
    savers = [callback for callback in callbacks if isinstance(callback, LatestCheckpoint)]
    trainer = build(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        default_root_dir=str(folder),
        enable_checkpointing=bool(savers),  # else Lightning adds a saver of its own
        plugins=[AnyCheckpoint(verify=task.verify and not verified)],
    )
    if checkpoint:
        log.info("continuing from %s", checkpoint)
    elif plain["init_from"] is not None:
        task.init_from = plain["init_from"]
        log.info("starting with the weights of %s", plain["init_from"])
    try:
        with RankWatch(trainer, folder):
            trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise InputError(f"{checkpoint} does not fit the model of this command: {' '.join(lines)}") from error
    except SystemExit:  # Lightning's answer to Ctrl-C, after saving a checkpoint
        raise KeyboardInterrupt from None
    metrics = {key: value for saver in savers for key, value in saver.metrics.items()}
    metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    # The run was over but for this; weights and averages are at hand.
    unfinished = [c for c in callbacks if isinstance(c, Generation) and not c.finished]
    if not validation.is_done(trainer) or unfinished:
        trainer.validate(task, datamodule=data, verbose=False)
        metrics |= {key: float(value) for key, value in trainer.callback_metrics.items()}
    for callback in callbacks:
        if callback not in savers:
            metrics |= getattr(callback, "metrics", {})
    if trainer.is_global_zero:
        if not (folder / "config.yaml").exists():
            raise gone(folder)
        write_bytes(folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    return metrics


def chosen(nodes: DictConfig | None) -> list[DictConfig]:
    """Nodes of a group that name a class; a preset may also set options of callbacks that were not chosen."""
    return [node for node in (nodes or {}).values() if node and "_target_" in node]


def check_folder(folder: Path, plain: dict[str, Any]) -> dict[str, float] | None:
    """Refuse a folder in which another run has results; the metrics, if this run is finished there.

    A run that saved nothing, because it failed early, leaves its folder free.
    """
    done, config_file = folder / "metrics.json", folder / "config.yaml"
    started_by_lightning = "LOCAL_RANK" in os.environ and "RANK" not in os.environ  # after the first one looked
    if plain["overwrite"] or started_by_lightning or not config_file.exists():
        return None
    if not done.exists() and not step_checkpoints(folder / "checkpoints"):
        return None
    difference = differing_keys(yaml.safe_load(config_file.read_text()), plain)
    if difference:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(difference[:6])}); choose another "
            "hydra.run.dir=, give the same settings to continue it, or overwrite=true to replace it"
        )
    return json.loads(done.read_text()) if done.exists() else None


def claim_folder(folder: Path, plain: dict[str, Any]) -> None:
    """Make the folder this run's, before anything is trained."""
    if not leads():
        return
    config_file = folder / "config.yaml"
    # A run that saved nothing may have logged something, which is another's if its settings were others.
    others = config_file.exists() and differing_keys(yaml.safe_load(config_file.read_text()), plain)
    if plain["overwrite"] or others:
        for old in ("metrics.json", NOTE, MEMORY, WAITING, "logs/metrics.csv"):
            (folder / old).unlink(missing_ok=True)
        discard_checkpoints(folder / "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(config_file, yaml.safe_dump(redacted(plain), sort_keys=False).encode())


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """``key: old -> new`` of every leaf that differs, but for credentials, which are not written down."""
    old, new = (redacted(old), redacted(new)) if not prefix else (old, new)
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if (prefix or key not in VOLATILE) and f"{prefix}{key}" not in PLACEMENT]
        later = {key for key in keys if key not in old and new[key] in UNSET}  # the version before had no such option
        keys = [key for key in keys if key not in later]
        return [line for key in keys for line in differing_keys(old.get(key), new.get(key), f"{prefix}{key}.")]
    return [] if old == new else [f"{prefix[:-1]}: {old} -> {new}"]


def reopen(folder: Path, node: DictConfig) -> Any:
    """Build a logger; a continued run goes on in the MLflow run it began, a job of a sweep is a child of its."""
    if not node["_target_"].endswith("MLFlowLogger"):
        return build(node)
    # Runs that were begun with Lightning's own logger name that, and an option that only it has.
    plain: Any = OmegaConf.to_container(node, resolve=True)
    options = {key: value for key, value in plain.items() if key not in ("_target_", "log_model")}
    logger = MLFlowLogger(**options, folder=folder)
    if leads():
        logger.begin({"mlflow.parentRunId": os.environ.get(PARENT)})
    return logger


def finished(plain: dict[str, Any]) -> dict[str, float] | None:
    """Metrics of the run that a resolved config describes, if it is over: a sweep asks, and does not run it again."""
    folder = Path(plain["run_dir"])
    metrics = check_folder(folder, plain)
    if metrics is not None and leads():
        deliver_waiting(folder, plain)
    return metrics


main = hydra_main("train")(run)

if __name__ == "__main__":
    main()
