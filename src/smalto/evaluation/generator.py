"""A class-conditional generator to rows of scores: one for every sampling setting and number of samples."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.data.ranks import Ranks
from smalto.evaluation.codes import measure_codes
from smalto.evaluation.report import Measured, short
from smalto.evaluation.samples import Draw, from_codes, from_task, measure_samples
from smalto.evaluation.saved import SavedPictures
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics
from smalto.sampling.requests import LabelKind
from smalto.sampling.service import fixed_weights
from smalto.types import SamplingConfig

log = logging.getLogger(__name__)


class SampleRows:
    """What all rows of an evaluation have in common.

    Args:
        suite: with the real side, measuring in this process alone.
        counts: numbers of samples at which scores are taken.
        part_dir: for what is finished before the whole is.
        batch_size: images drawn together.
        ranks: the processes; scores are those of rank 0, others get no rows.
        save: for the images; None keeps none.
    """

    def __init__(
        self,
        *,
        suite: GenerationMetrics,
        counts: Sequence[int],
        part_dir: Path,
        batch_size: int,
        ranks: Ranks,
        save: SavedPictures | None = None,
    ) -> None:
        self.suite, self.counts = suite, counts
        self._part_dir, self._batch_size, self._ranks, self._save = part_dir, batch_size, ranks, save

    def measure(self, draw: Draw, *, settings: dict[str, Any], name: str = "samples") -> list[Measured]:
        """One row per count; ``name`` is that of the bar and of the folders."""
        found = measure_samples(
            draw,
            suite=self.suite,
            tiers=self.counts,
            blocks_dir=self._part_dir / name,
            batch_size=self._batch_size,
            name=name,
            ranks=self._ranks,
            keep=self._writer(name),
        )
        several = len(self.counts) > 1
        return [Measured(scores, settings | ({"num_samples": n} if several else {})) for n, scores in found.items()]

    def _writer(self, name: str) -> Callable[[Sequence[int], Tensor], None] | None:
        if self._save is None:
            return None
        pictures = self._save.folder(name, max(self.counts))
        return lambda indices, image: pictures.write(indices, image)


def measure_generator(
    task: Any,
    *,
    rows: SampleRows,
    grid: Sequence[tuple[dict[str, Any], SamplingConfig]],
    classes: Sequence[str],
    labels: LabelKind,
    seed: int,
    codes: Any = None,
    baselines: bool = False,
) -> list[Measured]:
    """FID and its relatives for every setting; beside the first, the loss on held-out codes.

    Args:
        task: of the generator, in eval mode, on its device.
        rows: see `SampleRows`.
        grid: settings as the table names them, and as the sampler takes them.
        classes: names of the classes; may be empty.
        labels: ``balanced`` or ``random``.
        seed: of labels and images.
        codes: data module of the codes it was trained on, set up; None without loss.
        baselines: measure pictures of codes that were drawn blindly as well; needs ``codes``.
    """
    common: dict[str, Any] = {"classes": range(task.net.conditioner.num_classes), "labels": labels, "seed": seed}
    table: list[Measured] = []
    for settings, sampling in grid:
        name = "-".join(f"{key}{short(value)}" for key, value in settings.items()) or "samples"
        with fixed_weights(task):
            table += rows.measure(from_task(task, sampling=sampling, **common), settings=settings, name=name)
        found = dict(zip(classes, rows.suite.per_class_accuracy, strict=False))
        if found:
            log.info("class accuracy: %s", ", ".join(f"{key} {value:.0%}" for key, value in found.items()))
    if codes is None:
        return table
    loss, weights = measure_codes(task, codes)
    extra = table[0].scores if table else Scores()  # other ranks have no rows, but share the work
    extra.update(loss)
    uniform = torch.ones_like(weights, dtype=torch.float)
    blind = {"uniform_codes": uniform, "position_frequencies": weights.float()} if baselines else {}
    for name, weight in blind.items():
        for row in rows.measure(from_codes(task, weights=weight, **common), settings={}, name=name)[:1]:
            for key, value in row.scores.values.items():
                if key.startswith("fid_"):
                    extra.add(f"{name}/{key}", value)
    return table
