"""Samples while training: a sheet of fixed seeds, FID and its relatives on the averaged weights."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import lightning as L

from smalto.callbacks.ema import averaged_weights
from smalto.callbacks.pictures import log_picture, log_values
from smalto.data.images import ImageShards
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.suite import GenerationMetrics
from smalto.sampling.requests import balanced_labels, image_seeds
from smalto.sampling.sheet import image_sheet
from smalto.types import SamplingConfig

log = logging.getLogger(__name__)


class Generation(L.Callback):
    """Every ``every_n_steps`` and at the end: samples, a sheet, FID, IS, precision, recall, class accuracy.

    Labels go round the classes, image i has its own seed: the same images are asked for every time, whatever the
    number of processes. Nothing is drawn from the generators that training uses.

    Args:
        features: network behind the metrics; its name is part of theirs.
        reference: data module whose validation images are the real side.
        sampling: how codes are drawn.
        every_n_steps: optimizer steps between two evaluations; 0 evaluates at the end only.
        num_samples: images per evaluation; 0 makes the sheet only.
        final_num_samples: images of the last evaluation.
        batch_size: images decoded together, per process.
        cfg_scales: guidance scales to compare; metric names then start with ``gen/cfgSCALE/``. None uses the one of
            ``sampling`` and names start with ``gen/``.
        sheet_classes: rows of the sheet, the first classes.
        sheet_columns: images per row.
        seed: of the images.
    """

    def __init__(
        self,
        *,
        features: FeatureExtractor,
        reference: ImageShards,
        sampling: SamplingConfig,
        every_n_steps: int,
        num_samples: int,
        final_num_samples: int,
        batch_size: int = 100,
        cfg_scales: Sequence[float] | None = None,
        sheet_classes: int = 10,
        sheet_columns: int = 10,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.reference = reference
        self.sampling = sampling
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.final_num_samples = final_num_samples
        self.batch_size = batch_size
        self.cfg_scales = cfg_scales
        self.sheet_classes = sheet_classes
        self.sheet_columns = sheet_columns
        self.seed = seed
        self.metrics: dict[str, float] = {}
        """Values of the newest evaluation."""
        self._suite: GenerationMetrics | None = None
        self._done_at = -1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Fail before training, not after hours of it, when there is nothing to compare with or to decode with."""
        if getattr(pl_module, "tokenizer_ckpt", None) is None:
            raise ValueError(
                "callbacks.generation decodes samples, which needs the tokenizer: set task.tokenizer_ckpt=PATH, or "
                "callbacks=none to train without pictures"
            )
        self.reference.setup("fit")
        if self.reference.num_classes is None or self.reference.num_val == 0:
            raise ValueError(
                "callbacks.generation.reference has no labelled validation images to compare with; prepare the images "
                "with labels and val_fraction > 0"
            )
        self.num_classes: int = self.reference.num_classes

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Evaluate when the interval is full."""
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step not in (self._done_at, trainer.max_steps):
            self.evaluate(trainer, pl_module, self.num_samples)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last evaluation, on more images; after the last checkpoint, and repeated if it was interrupted."""
        self.evaluate(trainer, pl_module, self.final_num_samples)

    def evaluate(self, trainer: L.Trainer, pl_module: Any, num_samples: int) -> None:
        """Sample, measure, log."""
        self._done_at = trainer.global_step
        start = time.perf_counter()
        self.metrics = {}
        with averaged_weights(trainer, pl_module.net):
            for scale in self.cfg_scales or [self.sampling.cfg_scale]:
                prefix = f"gen/cfg{scale}/" if self.cfg_scales else "gen/"
                sampling = replace(self.sampling, cfg_scale=scale)
                if trainer.is_global_zero:
                    self._sheet(trainer, pl_module, sampling, prefix.strip("/"))
                if num_samples:
                    values = self._measure(trainer, pl_module, sampling, num_samples)
                    self.metrics |= {prefix + key: value for key, value in values.items()}
        log_values(trainer, self.metrics)
        if trainer.is_global_zero and self.metrics:
            table = ", ".join(f"{key.removeprefix('gen/')} {value:.4g}" for key, value in self.metrics.items())
            seconds = time.perf_counter() - start
            log.info("step %d, %d samples in %.0f s: %s", trainer.global_step, num_samples, seconds, table)

    def _sheet(self, trainer: L.Trainer, pl_module: Any, sampling: SamplingConfig, name: str) -> None:
        classes = range(min(self.sheet_classes, self.num_classes))
        labels = balanced_labels(range(len(classes) * self.sheet_columns), classes).view(-1, len(classes)).T.flatten()
        images = pl_module.sample_images(labels, sampling=sampling, seeds=image_seeds(self.seed, range(len(labels))))
        names = [self.reference.classes[c] for c in classes] if self.reference.classes else [str(c) for c in classes]
        log_picture(trainer, f"sheets/{name}", image_sheet(images, columns=self.sheet_columns, row_names=names))

    def _measure(self, trainer: L.Trainer, pl_module: Any, sampling: SamplingConfig, count: int) -> dict[str, float]:
        suite = self._real_side(trainer, pl_module)
        mine = range(trainer.global_rank, count, trainer.world_size)
        classes = range(self.num_classes)
        for start in range(0, len(mine), self.batch_size):
            indices = mine[start : start + self.batch_size]
            labels = balanced_labels(indices, classes)
            # Offset by the sheet's seeds: the sheet shows images that are not measured, and the other way round.
            seeds = image_seeds(self.seed + 1, indices)
            suite.update_fake(pl_module.sample_images(labels, sampling=sampling, seeds=seeds), labels)
        values = suite.compute()
        suite.reset_fake()
        return values

    def _real_side(self, trainer: L.Trainer, pl_module: Any) -> GenerationMetrics:
        if self._suite is None:
            suite = GenerationMetrics(features=self.features, num_classes=self.reference.num_classes)
            suite.to(pl_module.device)
            self.reference.trainer = trainer  # ranks share the images
            for batch in self.reference.val_dataloader():
                suite.update_real(batch["image"].to(pl_module.device), batch["label"])
            suite.finish_real()
            self._suite = suite
        return self._suite
