"""Pictures of a run: a PNG in its folder, and the same in MLflow with a slider over steps."""

from pathlib import Path

import lightning as L
from PIL import Image

from smalto.callbacks.mlflow_logger import MLFlowLogger


def log_picture(trainer: L.Trainer, name: str, picture: Image.Image) -> Path:
    """Save under ``NAME/step_XXXXXXXX.png`` of the run folder and log to MLflow; returns the file."""
    step = trainer.global_step
    path = Path(trainer.default_root_dir) / name / f"step_{step:08d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for logger in trainer.loggers:
        if isinstance(logger, MLFlowLogger):
            logger.log_picture(path, name, step)
    return path


def log_values(trainer: L.Trainer, values: dict[str, float]) -> None:
    """Log outside the hooks where Lightning lets modules log."""
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)
