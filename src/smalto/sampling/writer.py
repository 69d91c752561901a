"""Where samples go: a folder of PNG files that a killed job continues, packed as ``.npz`` at the end."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from smalto.data.pictures import read_picture_file
from smalto.data.transforms import decode_image
from smalto.errors import InputError
from smalto.files import replacing, sync


class PictureFolder:
    """Files ``000000.png``, ``000001.png``, ... by image number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, index: int) -> Path:
        """Where image ``index`` is or will be."""
        return self.path / f"{index:06d}.png"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those that are not written yet, or that a power cut took the end of."""
        return [i for i in indices if not _is_whole(self.file(i))]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Save uint8 (B, 3, H, W); a file appears whole or not at all, but through a power cut only after ``sync``."""
        for i, pixels in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            with replacing(self.file(i), lasting=False) as unfinished:
                Image.fromarray(np.ascontiguousarray(pixels)).save(unfinished, format="PNG")

    def sync(self, indices: Sequence[int]) -> None:
        """Have these on the disk: before something says that they are finished."""
        for path in (*map(self.file, indices), self.path):
            sync(path)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3).

        Raises:
            ValueError: they are of several sizes, or damaged.
        """
        pixels = [_pixels(self.file(i)) for i in indices]
        if len({image.shape for image in pixels}) > 1:
            raise InputError(f"{self.path} holds images of several sizes; draw them anew")
        return np.stack(pixels)


def _is_whole(path: Path) -> bool:
    """Whether a file begins and ends as a PNG does; not through a link."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if file.read(len(_PNG_BEGIN)) != _PNG_BEGIN:
                return False
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False


def _pixels(path: Path) -> np.ndarray:
    try:
        return np.asarray(decode_image(read_picture_file(path)))
    except ValueError as error:
        raise InputError(f"{path} cannot be read ({error}); remove it and run the same command again") from error


_PNG_BEGIN, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def pack_npz(
    folder: PictureFolder,
    count: int,
    path: Path,
    *,
    labels: np.ndarray | None = None,
    shuffle_seed: int | None = 0,
    chunk: int = 256,
) -> None:
    """Write ``arr_0`` uint8 (N, H, W, 3), the layout of ADM's evaluator, a chunk at a time.

    Images are shuffled, because that evaluator takes the Inception Score over consecutive splits: sorted by class it
    comes out far too low. ``index`` int64 (N,) holds the number of each image, ``labels`` (N,) its label if given.
    50,000 images of 256 px need no more memory than one chunk.

    Args:
        folder: the images.
        count: the first so many of them.
        path: the file; it appears under its name only when complete.
        labels: (N,) in the order of image numbers.
        shuffle_seed: equal seeds give equal orders, so that originals and reconstructions stay pairs; None keeps the
            order of the numbers.
        chunk: images read together.

    Raises:
        ValueError: pictures of several sizes, or damaged.
    """
    order = np.arange(count) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(count)
    size = folder.read([0])[0].shape
    beside = {"index": order} | ({} if labels is None else {"labels": labels[order]})
    with (
        replacing(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *size)}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, count, chunk):
                pixels = folder.read(order[start : start + chunk].tolist())
                if pixels.shape[1:] != size:
                    raise InputError(f"{folder.path} holds images of several sizes; draw them anew")
                stream.write(pixels.tobytes())
        for name, array in beside.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
