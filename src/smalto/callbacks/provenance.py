"""What a run was: its config, versions and commit, in the run folder, in the logger and in every checkpoint."""

import json
import logging
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.utilities import rank_zero_only

from smalto import __version__
from smalto.callbacks.mlflow_logger import MLFlowLogger
from smalto.data.ranks import agreed
from smalto.errors import InputError
from smalto.redact import redacted
from smalto.tasks.contents import CONFIG_KEY

log = logging.getLogger(__name__)
PACKAGES = ("torch", "lightning", "hydra-core", "torchmetrics", "webdataset", "mlflow", "numpy")


def git_commit() -> str:
    """Commit of the checkout that runs, ``-dirty`` appended if it has changes; ``unknown`` outside of one."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def networks(trainer: L.Trainer, pl_module: Any) -> list[str]:
    """Names of the frozen networks behind metrics and losses of a run."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    found = [callback.features.name for callback in callbacks if hasattr(callback, "features")]
    perceptual = getattr(pl_module, "perceptual", None)
    return [*found, *([] if perceptual is None else [perceptual.name])]


class Provenance(L.Callback):
    """Writes and logs the origin of a run.

    Args:
        config: the resolved config as plain data; credentials in it are not written down.
        kind: ``tokenizer`` or ``gpt``.
    """

    def __init__(self, config: dict[str, Any], *, kind: str) -> None:
        self.config = redacted(config)
        self.kind = kind

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """See that all processes compute with the same networks, then write the origin down."""
        mine = networks(trainer, pl_module)
        first = trainer.strategy.broadcast(mine)

        def compared() -> None:
            if mine != first:
                raise InputError(
                    f"this process would measure and train with {', '.join(mine)}, the first one with "
                    f"{', '.join(first)}: features=auto and perceptual=auto choose by the weight files of a machine; "
                    "put the same files on all, or name the networks: features=lite0 perceptual=squeeze_caffe"
                )

        agreed(compared, world_size=trainer.world_size)
        self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Log parameters and versions, and print what is about to happen."""
        folder = Path(trainer.default_root_dir)
        origin = {
            "commit": git_commit(),
            "smalto": __version__,
            "python": platform.python_version(),
            "command": redacted(" ".join(sys.argv)),
            **{name: version(name) for name in PACKAGES},
        }
        (folder / "provenance.json").write_text(json.dumps(origin, indent=2) + "\n")
        trainable = sum(p.numel() for p in pl_module.net.parameters() if p.requires_grad)
        for logger in trainer.loggers:
            logger.log_hyperparams(self.config)
            if isinstance(logger, MLFlowLogger):
                logger.log_tags(origin)
                logger.log_text(yaml.safe_dump(redacted(self.config), sort_keys=False), "config.yaml")
                logger.log_metrics({"parameters": trainable})
                logger.mark("RUNNING")
        log.info(
            "%s of %s parameters, %d device(s), global batch %s, to step %s; run folder %s",
            self.kind,
            f"{trainable:,}",
            trainer.world_size,
            self.config["data"].get("batch_size"),
            trainer.max_steps if trainer.max_steps > 0 else f"epoch {trainer.max_epochs}",
            folder,
        )

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checkpoints carry their config, so that using one needs nothing else."""
        checkpoint[CONFIG_KEY] = {
            "version": __version__,
            "kind": self.kind,
            # Where a run was logged and where its files lay says nothing to whoever gets the checkpoint.
            "config": {key: value for key, value in self.config.items() if key not in ("logger", "paths")},
            "classes": list(getattr(getattr(trainer, "datamodule", None), "classes", None) or []),
        }
