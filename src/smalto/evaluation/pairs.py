"""Images and their reconstructions to scores, one pass."""

from collections.abc import Callable, Set
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


def from_sets(originals: PictureSet, rebuilt: PictureSet, *, pairing: str = "name") -> Pairs:
    """Two sets that belong together, by name or by order, see `match`."""
    partners, _ = match(originals, rebuilt, pairing=pairing)

    def pairs(indices: range) -> tuple[Tensor, Tensor, None]:
        image, other = originals.read(indices), rebuilt.read([partners[i] for i in indices])
        if image.shape != other.shape:
            raise InputError(
                f"{originals.path} has images of {image.shape[-1]}x{image.shape[-2]} px, {rebuilt.path} of "
                f"{other.shape[-1]}x{other.shape[-2]}; give image_size=SIDE to crop the originals as the others were"
            )
        return image, other, None

    return pairs


def match(originals: PictureSet, rebuilt: PictureSet, *, pairing: str = "name") -> tuple[list[int], str]:
    """Which image of ``rebuilt`` belongs to each original, and how that was found: ``by name``, number or order.

    Names are those of files without suffix, or the ``index`` of an ``.npz``. Names that are whole numbers may have
    other numbers of zeros in front. Images without names, of shards or of an ``.npz`` without ``index``, are counted.

    Args:
        originals: the one set.
        rebuilt: the other.
        pairing: ``name``, or ``order`` to match the first with the first whatever their names.

    Raises:
        ValueError: sets of different length; names that do not agree, or that two images share.
    """
    if len(originals) != len(rebuilt):
        raise InputError(
            f"{rebuilt.path} holds {len(rebuilt)} images, {originals.path} {len(originals)}; reconstructions need one "
            "original each"
        )
    places = list(range(len(originals)))
    if pairing == "order" or not (originals.named or rebuilt.named):
        return places, "by order"
    mine, theirs = (_names(pictures) for pictures in (originals, rebuilt))
    if mine.keys() == theirs.keys():
        return [theirs[name] for name in mine], "by name"
    numbers = [_numbers(names) for names in (mine, theirs)]
    if numbers[0] and numbers[1] and numbers[0].keys() == numbers[1].keys():
        return [numbers[1][number] for number in numbers[0]], "by number"
    if not (originals.named and rebuilt.named) and all(_is_ascending(found) for found in numbers):
        return places, "by order"
    raise InputError(
        f"the images of {originals.path} and {rebuilt.path} do not bear the same names: "
        f"{_some(mine.keys() - theirs.keys())} on the one side, {_some(theirs.keys() - mine.keys())} on the other. "
        "Name them alike, or give pairing=order to match the first with the first"
    )


def _names(pictures: PictureSet) -> dict[str, int]:
    names: dict[str, int] = {}
    for place in range(len(pictures)):
        name = pictures.name(place)
        if name in names:
            raise InputError(
                f"{pictures.path} holds two images named {name} (suffixes do not count), so pairs cannot be told by "
                "name; rename one, or give pairing=order"
            )
        names[name] = place
    return names


def _numbers(names: dict[str, int]) -> dict[int, int]:
    """The same by the numbers the names are; empty unless all are, each another."""
    if not all(name.isascii() and name.isdigit() for name in names):
        return {}
    numbers = {int(name): place for name, place in names.items()}
    return numbers if len(numbers) == len(names) else {}


def _is_ascending(numbers: dict[int, int]) -> bool:
    """Whether the order of the places is that of the numbers, where there are any: 1, 10, 2 is not."""
    return list(numbers) == sorted(numbers)


def _some(names: Set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


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
