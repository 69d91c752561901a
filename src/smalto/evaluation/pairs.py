"""Images and their reconstructions to scores, one pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.data.picture_sets import PictureSet
from smalto.data.progress import progress
from smalto.data.ranks import Ranks, shared_device
from smalto.data.transforms import to_float
from smalto.errors import InputError
from smalto.evaluation.begun import Begun, batches
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.scores import Scores

Pairs = Callable[[range], tuple[Tensor, Tensor, Tensor | None]]
"""Image numbers to originals and reconstructions, uint8 (B, 3, H, W) both, and codes (B, L) where they are known."""


def from_tokenizer(task: Any, pictures: PictureSet) -> Pairs:
    """Encode and decode; originals are resized and rounded as reconstructions are, if the task resizes."""

    def pairs(indices: range) -> tuple[Tensor, Tensor, Tensor]:
        image = pictures.read(indices).to(task.device)
        rebuilt, codes = task.reconstruct(image)
        if rebuilt.shape != image.shape:
            image = task.to_pixels(to_float(image))
        return image, rebuilt, codes

    return pairs


def from_sets(originals: PictureSet, rebuilt: PictureSet) -> Pairs:
    """Two sets that belong together, by name where both have the same names, else by order.

    Raises:
        ValueError: sets of different length.
    """
    if len(originals) != len(rebuilt):
        raise InputError(
            f"{rebuilt.path} holds {len(rebuilt)} images, {originals.path} {len(originals)}; reconstructions need one "
            "original each"
        )
    place = {originals.name(i): i for i in range(len(originals))}
    order = [place.get(rebuilt.name(i), -1) for i in range(len(rebuilt))]
    if -1 in order:
        order = list(range(len(originals)))

    def pairs(indices: range) -> tuple[Tensor, Tensor, None]:
        image, other = originals.read([order[i] for i in indices]), rebuilt.read(indices)
        if image.shape != other.shape:
            raise InputError(
                f"{originals.path} has images of {image.shape[-1]}x{image.shape[-2]} px, {rebuilt.path} of "
                f"{other.shape[-1]}x{other.shape[-2]}; give image_size=SIDE to crop the originals as the others were"
            )
        return image, other, None

    return pairs


def measure_pairs(
    pairs: Pairs,
    *,
    count: int,
    metrics: ReconstructionMetrics,
    part_file: Path,
    batch_size: int,
    ranks: Ranks,
    keep: Callable[[range, Tensor, Tensor], None] | None = None,
) -> Scores:
    """Scores of ``count`` pairs, on all processes together.

    Args:
        pairs: makes them.
        count: how many.
        metrics: begun anew.
        part_file: where a measurement that is interrupted is put aside; the number of this process is added.
        batch_size: pairs together.
        ranks: the processes.
        keep: gets image numbers, originals and reconstructions, for instance to write them.
    """
    todo = list(batches(range(count), batch_size))[ranks.rank :: ranks.world_size]
    name = f"{part_file.stem}.part{ranks.rank}of{ranks.world_size}x{batch_size}.pt"
    begun = Begun(part_file.with_name(name), metrics)
    done, _ = begun.restore()
    finished = sum(map(len, todo[:done]))
    with progress("reconstruct", total=sum(map(len, todo)), done=finished) as advance, torch.inference_mode():
        for number, indices in enumerate(todo[done:], start=done + 1):
            image, rebuilt, codes = pairs(indices)
            if keep is not None:
                keep(indices, image, rebuilt)
            device = metrics.distribution.device
            metrics.update(image.to(device), rebuilt.to(device), codes)
            advance(len(indices))
            begun.save(number)
    if ranks.world_size > 1:
        metrics.to(shared_device(metrics.distribution.device))
    scores = metrics.compute()
    begun.remove()
    return scores
