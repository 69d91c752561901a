"""The MNIST family: IDX files, and Fashion-MNIST, part of which comes with smalto."""

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smalto.data.annotations import given_names
from smalto.data.foreign import open_plain
from smalto.data.sources import ArraySource, Part
from smalto.errors import InputError, MissingFile

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
_EMBEDDED = Path(__file__).parent / "fashion_mnist"


class FashionMnist(ArraySource):
    """Fashion-MNIST: 28x28 grey pictures of clothes, 10 classes (Xiao, Rasul, Vollgraf 2017; MIT licence).

    Args:
        subset: ``t10k``, the 10,000 test images that come with smalto (no split of their own), or
            ``full``, all 70,000 (split train / test), from files on this machine.
        path: folder with the four IDX files, ``.gz`` or not, for ``full``; None looks where the Debian
            package dataset-fashion-mnist puts them and in ``download_dir``.
        download: fetch the files of ``full`` with torchvision when they are not found.
        download_dir: where downloads go.

    Raises:
        ValueError: another subset.
        FileNotFoundError: ``full`` without files.
    """

    def __init__(
        self,
        *,
        subset: Literal["t10k", "full"] = "t10k",
        path: str | Path | None = None,
        download: bool = False,
        download_dir: str | Path | None = None,
    ) -> None:
        super().__init__(FASHION_CLASSES)
        if subset not in ("t10k", "full"):
            raise InputError(f"subset is {subset!r}; it must be t10k (embedded, 10,000) or full (70,000)")
        if subset == "t10k" and (path is not None or download):
            raise InputError("subset=t10k is embedded and needs no path or download; give subset=full for these")
        if download and download_dir is None:
            raise InputError("download=true needs download_dir, the folder to download into")
        self._subset, self._path = subset, path
        self._download, self._download_dir = download, download_dir

    def load(self) -> list[Part]:
        """Parts of the subset."""
        if self._subset == "t10k":
            return [("t10k", None, *_idx_pair(_EMBEDDED, "t10k"))]
        folder = self._find()
        return [(name, split, *_idx_pair(folder, name)) for name, split in (("train", "train"), ("t10k", "test"))]

    def _find(self) -> Path:
        downloads = None if self._download_dir is None else Path(self._download_dir)
        raw = None if downloads is None else downloads / "FashionMNIST" / "raw"
        tried = [Path(self._path)] if self._path is not None else [DEBIAN_FOLDER, *([raw] if raw else [])]
        for folder in tried:
            if all(_idx_file(folder, name, kind) for name in ("train", "t10k") for kind in ("images", "labels")):
                return folder
        if self._download and raw is not None:
            from torchvision.datasets import FashionMNIST

            FashionMNIST(str(downloads), download=True)
            return raw
        raise MissingFile(
            f"the four IDX files of Fashion-MNIST are not in {' or '.join(map(str, tried))}; set "
            "source.path, "
            "install the Debian package dataset-fashion-mnist, or set source.download=true"
        )


class Idx(ArraySource):
    """Any set in the IDX format of MNIST: EMNIST, KMNIST, ...

    Args:
        images: file of uint8 images (N, H, W), ``.gz`` or not.
        labels: file of uint8 labels (N,).
        val_images: the same for a validation split; None: no split of its own.
        val_labels: labels of ``val_images``.
        classes: names in the order of the labels; None: the numbers.

    Raises:
        ValueError: not IDX, or images and labels of different number.
        FileNotFoundError: no such file.
    """

    def __init__(
        self,
        *,
        images: str | Path,
        labels: str | Path,
        val_images: str | Path | None = None,
        val_labels: str | Path | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__(given_names(classes or ()))
        if (val_images is None) != (val_labels is None):
            raise InputError("val_images and val_labels belong together; give both or none")
        self._files = [("images", None if val_images is None else "train", images, labels)]
        if val_images is not None and val_labels is not None:
            self._files.append(("val_images", "val", val_images, val_labels))

    def load(self) -> list[Part]:
        """Parts of the subset."""
        return [(name, split, *read_idx_pair(Path(i), Path(k))) for name, split, i, k in self._files]


def read_idx(path: Path) -> np.ndarray:
    """A uint8 array from an IDX file, gzipped or not.

    Raises:
        ValueError: not IDX of unsigned bytes, or cut short.
    """
    try:
        with open_plain(path) as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            size = os.fstat(raw.fileno()).st_size * (_MOST_GZIP if packed else 1)
            file: Any = gzip.GzipFile(fileobj=raw) if packed else raw
            zeros, kind, dims = struct.unpack(">HBB", file.read(4))
            if zeros != 0 or kind != 8 or not 1 <= dims <= 3:
                raise InputError("not an IDX file of unsigned bytes")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            count = math.prod(shape)
            if count > size:  # before so much memory is asked for
                raise InputError(f"it claims {count} bytes")
            data = file.read(count + 1)
        if len(data) != count:
            raise InputError(f"it holds {len(data)}{' or more' if len(data) > count else ''} bytes, not {count}")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except FileNotFoundError as error:
        raise MissingFile(f"no file {path}; check source.images and source.labels") from error
    except (ValueError, struct.error, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} is not a whole IDX file: {error}") from error


_MOST_GZIP = 1032  # deflate makes no more of a byte


def read_idx_pair(images: Path, labels: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that belong together.

    Raises:
        ValueError: different numbers of images and labels, or not images.
    """
    x, y = read_idx(images), read_idx(labels)
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise InputError(f"{images} has shape {x.shape}, {labels} {y.shape}; expected (N, H, W) and (N,)")
    return x, y


def _idx_file(folder: Path, name: str, kind: str) -> Path | None:
    dims = {"images": 3, "labels": 1}[kind]
    stem = folder / f"{name}-{kind}-idx{dims}-ubyte"
    return next((p for p in (stem, stem.with_name(stem.name + ".gz")) if p.is_file()), None)


def _idx_pair(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    images, labels = _idx_file(folder, name, "images"), _idx_file(folder, name, "labels")
    if images is None or labels is None:
        raise MissingFile(f"{folder} has no {name}-images-idx3-ubyte(.gz) with its labels")
    return read_idx_pair(images, labels)
