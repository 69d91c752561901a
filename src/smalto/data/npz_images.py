"""``.npz`` files in the layout of ADM's evaluator: images in place, statistics if there are any."""

import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smalto.arrays import npz_array
from smalto.data.annotations import MAX_LABEL
from smalto.data.foreign import reading
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

IMAGES_KEY = "arr_0"
LABEL_KEYS = ("labels", "arr_1")
STATISTICS_KEYS = ("mu", "sigma", "mu_s", "sigma_s")


@dataclass(frozen=True)
class NpzStatistics:
    """Moments of Inception features as ADM's reference files hold them; float64 arrays.

    Args:
        mu: (2048,).
        sigma: (2048, 2048).
        mu_s: (2023,) of the spatial features; None when the file lacks them.
        sigma_s: (2023, 2023).
    """

    mu: np.ndarray
    sigma: np.ndarray
    mu_s: np.ndarray | None
    sigma_s: np.ndarray | None


def open_npz_images(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Images uint8 (N, H, W, 3) and labels (N,) of a file.

    The array is mapped where it is stored without compression, as ``np.savez`` and ADM do; else it is read whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ``.npz``, no images, or images of another form.
    """
    names = npz_names(path)
    if IMAGES_KEY not in names:
        raise InputError(
            f"{path} has no images: {IMAGES_KEY} is missing, it holds {', '.join(sorted(names)) or 'nothing'}"
        )
    images = _read(path, IMAGES_KEY)
    if images.dtype != np.uint8:
        bad = " with NaN or infinite pixels" if images.dtype.kind == "f" and not np.isfinite(images).all() else ""
        raise InputError(
            f"{path}: {IMAGES_KEY} is {images.dtype}{bad}; images must be uint8 in [0, 255], rounded by their maker"
        )
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise InputError(f"{path}: {IMAGES_KEY} has shape {images.shape}; images must be (N, height, width, 3)")
    for key in LABEL_KEYS:
        labels = _read(path, key) if key in names else None
        if labels is None:
            continue
        if (
            labels.shape == (len(images),)
            and labels.dtype.kind in "iu"
            and 0 <= labels.min() <= labels.max() <= MAX_LABEL
        ):
            return images, np.array(labels)
        log.warning(
            "%s: %s (%s, shape %s) holds no labels, that is a whole number from 0 for each of %d images: not used",
            path,
            key,
            labels.dtype,
            labels.shape,
            len(images),
        )
    return images, None


def read_npz_statistics(path: Path) -> NpzStatistics | None:
    """The statistics of a file; None when it has none.

    Raises:
        ValueError: only a part of them, or shapes that do not fit together, or values that are not finite.
    """
    names = npz_names(path)
    if not names & set(STATISTICS_KEYS):
        return None
    if not {"mu", "sigma"} <= names or ("mu_s" in names) != ("sigma_s" in names):
        raise InputError(
            f"{path} holds {', '.join(sorted(names & set(STATISTICS_KEYS)))}; statistics are mu and sigma, and mu_s "
            "with sigma_s for sFID"
        )
    found = {key: _numbers(path, key) if key in names else None for key in STATISTICS_KEYS}
    for mean_key, cov_key in (("mu", "sigma"), ("mu_s", "sigma_s")):
        mean, cov = found[mean_key], found[cov_key]
        if mean is None or cov is None:
            continue
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise InputError(
                f"{path}: {mean_key} has shape {mean.shape}, {cov_key} {cov.shape}; must be (D,) and (D, D)"
            )
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise InputError(f"{path}: {mean_key} or {cov_key} holds NaN or infinite values; the file is damaged")
    return NpzStatistics(**found)  # type: ignore[arg-type]


def npz_names(path: Path) -> set[str]:
    """Names of the arrays in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no ``.npz`` file.
    """
    if not path.is_file():
        raise MissingFile(f"no file {path}; check the path")
    with reading(f"{path} is no .npz file, or it was not written to its end"), zipfile.ZipFile(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _numbers(path: Path, key: str) -> np.ndarray:
    array = _read(path, key)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{path}: {key} is {array.dtype}; statistics are numbers")
    return np.array(array, dtype=np.float64)


def _read(path: Path, key: str) -> np.ndarray:
    with reading(f"{path}: {key} cannot be read"):
        return npz_array(path, key)
