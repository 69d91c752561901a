"""Samples while training: a sheet of fixed seeds, FID and its relatives on the averaged weights."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn

from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.ema import averaged_weights
from smalto.callbacks.pictures import log_picture, log_values
from smalto.data.images import ImageShards
from smalto.data.transforms import Rounding, to_pixels
from smalto.errors import InputError, MissingFile
from smalto.evaluation.references import find_reference
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics
from smalto.nn.tf32 import without_tf32
from smalto.sampling.requests import LabelKind, balanced_labels, image_seeds, wanted_labels
from smalto.sampling.service import draw_images, fixed_weights
from smalto.sampling.sheet import image_sheet
from smalto.types import SamplingConfig

log = logging.getLogger(__name__)


class Generation(L.Callback):
    """Every ``every_n_steps`` and at the end: samples, a sheet, FID, sFID, IS, KID, precision, recall, class accuracy.

    Image i has its own label and seed: the same images are asked for every time, whatever the number of processes.
    Nothing is drawn from the generators that training uses. FID depends on the number of images: names that start with
    ``gen/`` alone are measured at the first of ``num_samples``, also at the end, so that a curve is of one kind; larger
    counts are ``gen/nCOUNT/``.

    Args:
        features: network behind the metrics; its name is part of theirs.
        reference: data module whose validation images are the real side; says the classes too.
        sampling: how codes are drawn.
        every_n_steps: optimizer steps between two evaluations; 0 evaluates at the end only.
        num_samples: images per evaluation, or several counts, measured in one pass; 0 makes the sheet only.
        final_num_samples: the same for the last evaluation, beside those of ``num_samples``.
        reference_file: statistics to compare with instead of the validation images: an ADM ``.npz``, or a file that
            ``smalto evaluate reference=...`` made.
        cache_dir: where measured statistics of the real side are kept for the next run; None measures in every run.
        labels: ``balanced`` goes round the classes, ``random`` draws them as the authors do.
        rules: how the metrics are computed.
        eval_size: side at which images are measured, those of both sides resized to it; None: as they are.
        rounding: of pixels, see :func:`smalto.data.transforms.to_pixels`.
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
        num_samples: int | Sequence[int],
        final_num_samples: int | Sequence[int],
        reference_file: str | Path | None = None,
        cache_dir: str | Path | None = None,
        labels: LabelKind = "balanced",
        rules: Rules | None = None,
        eval_size: int | None = None,
        rounding: Rounding = "nearest",
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
        self.num_samples = _tiers("num_samples", num_samples)
        self.final_num_samples = sorted({*self.num_samples, *_tiers("final_num_samples", final_num_samples)})
        self.reference_file = reference_file
        self.cache_dir = cache_dir
        self.labels: LabelKind = labels
        self.rules = rules or Rules()
        self.eval_size = eval_size
        self.rounding: Rounding = rounding
        if eval_size is not None:
            reference.image_size = eval_size
        self.batch_size = batch_size
        self.cfg_scales = cfg_scales
        self.sheet_classes = sheet_classes
        self.sheet_columns = sheet_columns
        self.seed = seed
        self.metrics: dict[str, float] = {}
        """Values of the newest evaluation."""
        self._suite: GenerationMetrics | None = None
        self._done_at = -1
        self._fits = False
        self.finished = False
        """Whether the last evaluation of the run was made."""
        wanted_labels(labels, [], [0], seed)  # an unknown word fails here, not after hours

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Fail before training, not after hours of it, when there is nothing to compare with or to decode with."""
        if getattr(pl_module, "tokenizer_ckpt", None) is None:
            raise InputError(
                "callbacks.generation decodes samples, which needs the tokenizer: set task.tokenizer_ckpt=PATH, or "
                "callbacks=none to train without pictures"
            )
        self.reference.setup("fit")
        if self.reference.num_classes is None or self.reference.num_val == 0:
            raise InputError(
                "callbacks.generation.reference has no labelled validation images to compare with; prepare the images "
                "with labels and val_fraction > 0"
            )
        self.num_classes: int = self.reference.num_classes
        if self.reference_file is None and self.features.name == "inception":
            log.info(
                "FID is measured against the validation images of %s; published numbers are against ADM's file: "
                "callbacks.generation.reference_file=FILE",
                getattr(self.reference, "path", "the reference"),
            )
        if self.reference_file is not None and not Path(self.reference_file).exists():
            raise MissingFile(f"callbacks.generation.reference_file={self.reference_file} is not there")

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A step that a run goes on from was evaluated before it was saved."""
        self._done_at = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        """Evaluate when the interval is full."""
        step = trainer.global_step
        if not self._fits:  # once, beside all that training holds, and not hours later
            self._fits = True
            self._check_memory(pl_module)
        if self.every_n_steps and step % self.every_n_steps == 0 and step not in (self._done_at, trainer.max_steps):
            self._done_at = step
            self.evaluate(trainer, pl_module, self.num_samples)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last evaluation, on more images; after the last checkpoint.

        Not in ``on_fit_end``: Lightning has moved the model off its device by then.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LatestCheckpoint):  # Lightning would call it behind all others
                callback.on_train_end(trainer, pl_module)
        self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """The last evaluation of a run that was interrupted in it: all else is done, so nothing is trained."""
        if trainer.state.fn == TrainerFn.VALIDATING and not self.finished:
            self._finish(trainer, pl_module)

    def _finish(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.evaluate(trainer, pl_module, self.final_num_samples)
        self.finished = True

    def _check_memory(self, pl_module: Any) -> None:
        images = max(self.batch_size, min(self.sheet_classes, self.num_classes) * self.sheet_columns)
        scales = self.cfg_scales or [self.sampling.cfg_scale]
        try:
            pl_module.check_memory(images, guided=max(scales) > 1)
        except InputError as error:
            raise InputError(
                f"the samples while training (callbacks.generation.batch_size={self.batch_size}, a sheet of "
                f"{self.sheet_classes} x {self.sheet_columns}): {error}"
            ) from error

    def evaluate(self, trainer: L.Trainer, pl_module: Any, tiers: Sequence[int]) -> None:
        """Sample, measure at each of the counts ``tiers``, log."""
        start = time.perf_counter()
        device = trainer.strategy.root_device
        elsewhere = sorted(name for name, p in pl_module.named_parameters() if p.device != device)
        assert not elsewhere, f"the run computes on {device}; not there are {', '.join(elsewhere[:3])}, ..."
        self.metrics = {}
        with (
            without_tf32(),
            self._pixels(pl_module),
            averaged_weights(trainer, pl_module.net),
            fixed_weights(pl_module),
        ):
            for scale in self.cfg_scales or [self.sampling.cfg_scale]:
                prefix = f"gen/cfg{scale}/" if self.cfg_scales else "gen/"
                sampling = replace(self.sampling, cfg_scale=scale)
                if trainer.is_global_zero:
                    self._sheet(trainer, pl_module, sampling, prefix.strip("/"))
                for count, scores in self._measure(trainer, pl_module, sampling, tiers).items():
                    tier = "" if count == tiers[0] else f"n{count}/"
                    self.metrics |= {f"{prefix}{tier}{key}": value for key, value in scores.values.items()}
        log_values(trainer, self.metrics)
        if trainer.is_global_zero and self.metrics:
            table = ", ".join(f"{key.removeprefix('gen/')} {value:.4g}" for key, value in self.metrics.items())
            seconds = time.perf_counter() - start
            log.info("step %d, %s samples in %.0f s: %s", trainer.global_step, list(tiers), seconds, table)

    @contextmanager
    def _pixels(self, pl_module: Any) -> Iterator[None]:
        """Pictures as the protocol makes them: resized before they are rounded."""
        before = pl_module.to_pixels
        pl_module.to_pixels = partial(to_pixels, size=self.eval_size, rounding=self.rounding)
        try:
            yield
        finally:
            pl_module.to_pixels = before

    def _sheet(self, trainer: L.Trainer, pl_module: Any, sampling: SamplingConfig, name: str) -> None:
        classes = range(min(self.sheet_classes, self.num_classes))
        labels = balanced_labels(range(len(classes) * self.sheet_columns), classes).view(-1, len(classes)).T.flatten()
        images = pl_module.sample_images(labels, sampling=sampling, seeds=image_seeds(self.seed, range(len(labels))))
        names = [self.reference.classes[c] for c in classes] if self.reference.classes else [str(c) for c in classes]
        log_picture(trainer, f"sheets/{name}", image_sheet(images, columns=self.sheet_columns, row_names=names))

    def _measure(
        self, trainer: L.Trainer, pl_module: Any, sampling: SamplingConfig, tiers: Sequence[int]
    ) -> dict[int, Scores]:
        if not tiers:
            return {}
        suite = self._real_side(trainer, pl_module)
        found, done = {}, 0
        for count in tiers:
            mine = range(done + trainer.global_rank, count, trainer.world_size)
            # Offset by the sheet's seeds: the sheet shows images that are not measured, and the other way round.
            for batch in draw_images(
                pl_module,
                sampling=sampling,
                classes=range(self.num_classes),
                seed=self.seed + 1,
                indices=mine,
                batch_size=self.batch_size,
                labels=self.labels,
            ):
                suite.update_fake(batch.images, batch.labels, torch.tensor(batch.indices))
            done = count
            found[count] = suite.compute()
        suite.reset_fake()
        return found

    def _real_side(self, trainer: L.Trainer, pl_module: Any) -> GenerationMetrics:
        if self._suite is None:
            self.features.to(pl_module.device)
            known = self._known_reference(trainer)
            suite = GenerationMetrics(
                features=self.features, reference=known, num_classes=self.num_classes, rules=self.rules
            ).to(pl_module.device)
            if known is None:
                self.reference.trainer = trainer  # ranks share the images
                for batch in self.reference.val_dataloader():
                    suite.update_real(batch["image"].to(pl_module.device, non_blocking=True), batch["label"])
                suite.finish_real()
            self._suite = suite
        return self._suite

    def _known_reference(self, trainer: L.Trainer) -> Reference | None:
        """Statistics from a file, or measured once for all runs; None for images that are in no file."""
        path = self.reference_file or getattr(self.reference, "path", None)
        if path is None or (self.cache_dir is None and self.reference_file is None):
            return None
        return find_reference(
            path,
            features=self.features,
            kind="generation",
            rules=self.rules,
            cache_dir=self.cache_dir or Path(trainer.default_root_dir) / "references",
            image_size=self.reference.image_size,
            limit=None if self.reference_file else self.reference.num_val,
            batch_size=self.batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )


def _tiers(name: str, counts: int | Sequence[int]) -> list[int]:
    """Ascending counts; none for 0."""
    wanted = [counts] if isinstance(counts, int) else list(counts)
    if wanted in ([0], []):
        return []
    if min(wanted) < 2:
        raise InputError(f"callbacks.generation.{name} is {counts}; every count must be at least 2, or 0 for none")
    return sorted(set(wanted))
