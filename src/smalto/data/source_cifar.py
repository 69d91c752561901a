"""CIFAR-10 in the files of its authors."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.foreign import reading
from smalto.data.sources import ArraySource, Part
from smalto.errors import InputError, MissingFile

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class Cifar10(ArraySource):
    """CIFAR-10: 60,000 colour photographs of 32x32, 10 classes, split train / test (Krizhevsky 2009).

    Args:
        path: folder with ``data_batch_1`` .. ``data_batch_5`` and ``test_batch`` (python version) or the
            same with ``.bin`` (binary version); None looks in ``download_dir``.
        download: fetch the python version with torchvision when it is not found.
        download_dir: where downloads go.

    Raises:
        FileNotFoundError: no batches found.
        ValueError: a batch file is damaged or asks for foreign code.
    """

    def __init__(
        self,
        *,
        path: str | Path | None = None,
        download: bool = False,
        download_dir: str | Path | None = None,
    ) -> None:
        super().__init__(CIFAR10_CLASSES)
        if path is None and download_dir is None:
            raise InputError("cifar10 needs source.path, the folder with data_batch_1 .. test_batch")
        self._path, self._download, self._download_dir = path, download, download_dir

    def load(self) -> list[Part]:
        """Five training batches and the test batch."""
        names = [(f"data_batch_{n}", "train") for n in range(1, 6)] + [("test_batch", "test")]
        folder = Path(self._path) if self._path is not None else Path(str(self._download_dir)) / "cifar-10-batches-py"
        present = [p for p in (folder / names[0][0], folder / f"{names[0][0]}.bin") if p.is_file()]
        if not present and self._download:
            from torchvision.datasets import CIFAR10

            CIFAR10(str(folder.parent), download=True)
            present = [folder / names[0][0]]
        if not present:
            raise MissingFile(
                f"no data_batch_1 or data_batch_1.bin in {folder}; set source.path to the unpacked "
                "cifar-10-batches-py or -bin, or set source.download=true"
            )
        suffix = present[0].suffix
        read = _read_cifar_binary if suffix else _read_cifar_pickle
        return [(name, split, *read(folder / (name + suffix))) for name, split in names]


def _read_cifar_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(path.read_bytes(), np.uint8)
    if rows.size == 0 or rows.size % 3073:
        raise InputError(f"{path} has {rows.size} bytes; binary CIFAR-10 has 3,073 for each image")
    rows = rows.reshape(-1, 3073)
    return np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), rows[:, 0]


def _read_cifar_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with reading(f"{path} is not a CIFAR-10 batch"):  # whatever foreign opcodes lead to
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(batch, dict) or not {b"data", b"labels"} <= set(batch):
            raise ValueError("it is no dict with data and labels, in the python version for python 2")
        pixels, labels = batch[b"data"], batch[b"labels"]
        rows = pixels.array() if isinstance(pixels, _Array) else np.asarray(pixels)
        if rows.ndim != 2 or rows.shape[1] != 3072 or rows.dtype.kind not in "iu":
            raise ValueError(f"its pixels are {rows.dtype} of shape {rows.shape}, must be bytes of (N, 3072)")
        if rows.size and not 0 <= rows.min() <= rows.max() <= 255:
            raise ValueError("its pixels are not in [0, 255]")
        if not isinstance(labels, list) or not all(isinstance(label, int) for label in labels):
            raise ValueError("its labels are no list of whole numbers")
        if len(rows) != len(labels):
            raise ValueError(f"it holds {len(rows)} images and {len(labels)} labels")
        images = rows.astype(np.uint8).reshape(-1, 3, 32, 32)
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), np.array(labels, np.int64)


class _ArrayUnpickler(pickle._Unpickler):
    """Builds plain containers and descriptions of arrays; a pickle that names anything else is refused, not run.

    The one written in Python: that in C takes the memory for any number that a damaged file gives an object.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):  # how python 3 writes bytes in protocol 2
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch of images does not need")


class _Dtype:
    """Stands for ``numpy.dtype``."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name = name.decode("latin1") if isinstance(name, bytes) else name

    def __setstate__(self, state: Any) -> None:
        """Byte order and alignment, which bytes have not got."""


class _Array:
    """Stands for ``numpy.ndarray``, until its bytes are looked at."""

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.data = state

    def array(self) -> np.ndarray:
        """The bytes as numbers."""
        if self.dtype.name not in ("u1", "|u1") or self.fortran:
            order = " in Fortran's order" if self.fortran else ""
            raise ValueError(f"its pixels are {self.dtype.name}{order}, must be bytes in C order")
        data = self.data.encode("latin1") if isinstance(self.data, str) else self.data
        return np.frombuffer(data, np.uint8).reshape(self.shape)


def _reconstruct(kind: Any, shape: Any, dtype: Any) -> _Array:
    return _Array()


def _encode_latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")
