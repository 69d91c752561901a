"""Real images, damaged on purpose, against other real images: which metric sees what, and what it is blind to."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from smalto.analysis.damage import blur, drop_classes, duplicate, jpeg, noise
from smalto.data.progress import progress
from smalto.data.transforms import to_float
from smalto.errors import InputError
from smalto.losses.perceptual import PerceptualLoss
from smalto.metrics.distribution import FrechetDistance
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.image import PSNR
from smalto.metrics.manifold import precision_recall

LEVELS: Mapping[str, Sequence[float]] = {
    "blur": (0.5, 1, 2, 4),
    "noise": (5, 10, 20, 40),
    "jpeg": (50, 75, 90, 95),
    "dropped_classes": (2, 4, 6, 8),
    "duplicates": (0.25, 0.5, 0.75, 0.9),
}
"""The knob of each damage: sigma, std, loss, number of classes, share; see :mod:`smalto.analysis.damage`."""


@torch.no_grad()
def study(
    *,
    image: Tensor,
    label: Tensor,
    features: FeatureExtractor,
    perceptual: PerceptualLoss,
    num_images: int,
    levels: Mapping[str, Sequence[float]] = LEVELS,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure damaged real images as if a model had made them.

    The images are shuffled and halved. N of one half are the reference. N of the other half, damaged, stand for
    generated images; undamaged, they show what each metric gives for a perfect generator with N samples.

    Args:
        image: real, uint8 (M, 3, H, W).
        label: (M,) class numbers.
        features: network behind FID, precision and recall; sees the reference and every damaged set once.
        perceptual: network behind LPIPS.
        num_images: N, at most M / 2, and no more than the classes that are kept have in their half.
        levels: damages to do and how strongly; keys of `LEVELS`. Level 0, no damage, is always measured.
        seed: of the halves and of the noise.

    Returns:
        ``damage, level, features, fid, precision, recall, perceptual, lpips, psnr``, damages in the order of
        ``levels``, the strongest last. LPIPS and PSNR compare each image with its own original; where images are
        only chosen or repeated these are equal: LPIPS 0, and the PSNR that `PSNR` gives an exact copy.

    Raises:
        ValueError: an unknown damage, a level out of range, or too few images.
    """
    if unknown := set(levels) - set(LEVELS):
        raise InputError(f"unknown damage {', '.join(sorted(unknown))}; there are {', '.join(LEVELS)}")
    if not 0 < num_images <= len(image) // 2:
        raise InputError(f"num_images is {num_images}; of {len(image)} images it can be 1 to {len(image) // 2}")
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))
    held_out = order[len(image) // 2 :]
    reference, image, label = image[order[:num_images]], image[held_out], label[held_out]
    cases = [(damage, level) for damage in levels for level in sorted({0, *levels[damage]})]
    for damage, level in cases:  # what cannot be done is refused before minutes are spent on the rest
        _damaged(image, label, damage, level, num_images if damage == "dropped_classes" else 1, seed)
    damaging = [case for case in cases if case[1]]
    fid, rows = FrechetDistance(num_features=features.num_features), {}
    with progress("damaged images", total=(len(damaging) + 2) * num_images) as advance:
        real = features(reference).pool
        fid.update(real, real=True)
        advance(num_images)
        for damage, level in [("blur", 0), *damaging]:
            original, damaged = _damaged(image, label, damage, level, num_images, seed)
            pool = features(damaged).pool
            fid.reset()  # keeps the real side
            fid.update(pool, real=False)
            precision, recall = precision_recall(real, pool)
            rows[damage if level else "none", level] = {
                "features": features.name,
                "fid": float(fid.compute()),
                "precision": float(precision),
                "recall": float(recall),
                "perceptual": perceptual.name,
                "lpips": _lpips(perceptual, original, damaged),
                "psnr": _psnr(original, damaged),
            }
            advance(num_images)
    return pd.DataFrame(
        {"damage": damage, "level": float(level), **rows[damage if level else "none", level]} for damage, level in cases
    )


def _damaged(
    image: Tensor, label: Tensor, damage: str, level: float, num_images: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Originals and what became of them, both uint8 (N, 3, H, W)."""
    if damage in ("jpeg", "dropped_classes") and level != int(level):
        raise InputError(f"level {level} of {damage} must be a whole number")
    first = image[:num_images]
    if damage == "blur":
        return first, blur(first, sigma=level)
    if damage == "noise":
        # The same noise at every level, larger or smaller: levels differ in nothing else.
        return first, noise(first, std=level, generator=torch.Generator().manual_seed(seed))
    if damage == "jpeg":
        return first, jpeg(first, loss=int(level))
    if damage == "dropped_classes":
        chosen = drop_classes(image, label, num_dropped=int(level), num_images=num_images)
    else:
        chosen = duplicate(first, share=level)
    return chosen, chosen


def _lpips(perceptual: PerceptualLoss, image: Tensor, other: Tensor) -> float:
    pairs = zip(image.split(100), other.split(100), strict=True)
    return float(torch.cat([perceptual(to_float(one), to_float(two)) for one, two in pairs]).mean())


def _psnr(image: Tensor, other: Tensor) -> float:
    psnr = PSNR()
    psnr.update(image, other)
    return float(psnr.compute())
