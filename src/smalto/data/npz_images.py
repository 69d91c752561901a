"""``.npz`` files in the layout of ADM's evaluator: images in place, statistics if there are any."""

import logging
import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smalto.data.annotations import MAX_LABEL
from smalto.data.foreign import reading
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

IMAGES_KEY = "arr_0"
LABEL_KEYS = ("labels", "arr_1")
STATISTICS_KEYS = ("mu", "sigma", "mu_s", "sigma_s")
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field end the fixed part of a zip member's header


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
    """An array: mapped where it lies uncompressed, else read whole.

    Raises:
        ValueError: damaged, or it claims another size than it has.
    """
    with reading(f"{path}: {key} cannot be read"):
        with zipfile.ZipFile(path) as archive:
            name = f"{key}.npy" if f"{key}.npy" in archive.namelist() else key
            info = archive.getinfo(name)
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version not in _HEADERS:
                    raise ValueError(f"its version of .npy is {version}")
                shape, fortran, dtype = _HEADERS[version](member)
                header = member.tell()
                if dtype.hasobject:
                    raise ValueError("it holds Python objects")
                count = math.prod(shape)
                if info.file_size - header != count * dtype.itemsize:
                    raise ValueError(f"it claims {count} values of {dtype} and holds {info.file_size - header} bytes")
                if info.file_size > max(_FREE, _GROWTH * os.path.getsize(path)):
                    raise ValueError(f"it unpacks to {info.file_size} bytes, more than {_GROWTH} times the file")
                order: Literal["F", "C"] = "F" if fortran else "C"
                if info.compress_type != zipfile.ZIP_STORED or not count:
                    return np.frombuffer(member.read(), dtype, count).reshape(shape, order=order)
        with path.open("rb") as file:
            file.seek(info.header_offset)
            start = sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)), info.header_offset + _LOCAL_HEADER.size)
        return np.memmap(path, dtype=dtype, mode="r", shape=shape, offset=start + header, order=order)


_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_GROWTH = 200
_FREE = 2**28  # unpacked bytes before proportions count
