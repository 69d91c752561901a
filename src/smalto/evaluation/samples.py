"""Generated images to scores: one pass of drawing, decoding and feature extraction, measured at several counts."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.data.picture_sets import PictureSet
from smalto.data.progress import progress
from smalto.data.ranks import Ranks
from smalto.evaluation.begun import batches
from smalto.evaluation.blocks import FeatureBlocks
from smalto.metrics.features import Features
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics
from smalto.sampling.requests import LabelKind, image_seeds, wanted_labels
from smalto.sampling.service import ImageBatch, draw_images
from smalto.types import SamplesImages, SamplingConfig

Draw = Callable[[range, int], Iterator[ImageBatch]]
"""Images by their numbers, in batches of at most so many."""


def from_task(
    task: SamplesImages, *, classes: Sequence[int], labels: LabelKind, sampling: SamplingConfig, seed: int
) -> Draw:
    """Draw from a generator; image i depends on the settings, ``seed`` and i only."""

    def draw(indices: range, batch_size: int) -> Iterator[ImageBatch]:
        return draw_images(
            task,
            sampling=sampling,
            classes=classes,
            seed=seed,
            indices=indices,
            batch_size=batch_size,
            labels=labels,
        )

    return draw


def from_codes(task: Any, *, weights: Tensor, classes: Sequence[int], labels: LabelKind, seed: int) -> Draw:
    """Pictures of codes drawn place by place from ``weights`` (L, K), blind to each other: what counting explains."""

    def draw(indices: range, batch_size: int) -> Iterator[ImageBatch]:
        for chosen in batches(indices, batch_size):
            rows = []
            for image in image_seeds(seed, chosen).tolist():
                generator = torch.Generator().manual_seed(image)
                rows.append(torch.multinomial(weights, 1, generator=generator).squeeze(1))
            asked = wanted_labels(labels, chosen, classes, seed)
            yield ImageBatch(chosen, asked, task.decode_codes(torch.stack(rows).to(task.device)))

    return draw


def from_pictures(pictures: PictureSet) -> Draw:
    """Images made elsewhere."""

    def draw(indices: range, batch_size: int) -> Iterator[ImageBatch]:
        for chosen in batches(indices, batch_size):
            label = None if pictures.labels is None else pictures.labels[chosen.start : chosen.stop]
            yield ImageBatch(chosen, label, pictures.read(chosen))

    return draw


def settings_grid(base: SamplingConfig, **choices: Sequence[float] | None) -> list[SamplingConfig]:
    """All combinations of some fields of `SamplingConfig`; a field without choices stays that of ``base``."""
    given = {name: values for name, values in choices.items() if values}
    combinations: Iterator[dict[str, Any]] = (
        dict(zip(given, values, strict=True)) for values in product(*given.values())
    )
    return [replace(base, **chosen) for chosen in combinations]


def measure_samples(
    draw: Draw,
    *,
    suite: GenerationMetrics,
    tiers: Sequence[int],
    blocks_dir: Path,
    batch_size: int,
    name: str,
    ranks: Ranks,
    keep: Callable[[Sequence[int], Tensor], None] | None = None,
) -> dict[int, Scores]:
    """Scores of the first ``tiers[i]`` images each; all images are drawn once, on all processes together.

    Args:
        draw: makes images.
        suite: with the real side; the generated side is begun anew, on rank 0.
        tiers: counts.
        blocks_dir: for features of finished images; a killed measurement with the same folder goes on.
        batch_size: images drawn together.
        name: for the progress bar.
        ranks: the processes.
        keep: gets image numbers and images, for instance to write them.

    Returns:
        By count; empty on other ranks than 0.
    """
    blocks = FeatureBlocks(blocks_dir, count=max(tiers), edges=tiers)
    todo: list[range] = ranks.decide(blocks.missing)  # by one: others may look when the first has written
    missing = todo[ranks.rank :: ranks.world_size]
    done = (max(tiers) - sum(map(len, todo))) // ranks.world_size
    with progress(name, total=done + sum(map(len, missing)), done=done) as advance:
        for block in missing:
            parts, labels = [], []
            for batch in draw(block, batch_size):
                if keep is not None:
                    keep(batch.indices, batch.images)
                parts.append(suite.features(batch.images.to(suite.device)))
                labels.append(batch.labels)
                advance(len(batch.indices))
            known = [label for label in labels if label is not None]
            blocks.write(block, Features.joined(parts), torch.cat(known) if len(known) == len(labels) else None)
    ranks.wait()
    return _scores(blocks, suite, tiers) if ranks.first else {}


def _scores(blocks: FeatureBlocks, suite: GenerationMetrics, tiers: Sequence[int]) -> dict[int, Scores]:
    suite.reset_fake()
    found: dict[int, Scores] = {}
    for block, features, label in blocks.read():
        suite.update_fake_features(features.to(suite.device), label, torch.arange(block.start, block.stop))
        if block.stop in tiers:
            found[block.stop] = suite.compute()
    return found
