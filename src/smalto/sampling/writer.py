"""Where samples go: a folder of PNG files that a killed job continues, packed as ``.npz`` at the end."""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from smalto.data.transforms import decode_image
from smalto.files import replacing


class PictureFolder:
    """Files ``000000.png``, ``000001.png``, ... by image number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def file(self, index: int) -> Path:
        """Where image ``index`` is or will be."""
        return self.path / f"{index:06d}.png"

    def missing(self, indices: Sequence[int]) -> list[int]:
        """Those that are not written yet."""
        return [i for i in indices if not self.file(i).exists()]

    def write(self, indices: Sequence[int], images: Tensor) -> None:
        """Save uint8 (B, 3, H, W); a file appears whole or not at all."""
        for i, pixels in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
            with replacing(self.file(i)) as unfinished:
                Image.fromarray(np.ascontiguousarray(pixels)).save(unfinished, format="PNG")

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 (B, H, W, 3)."""
        return np.stack([np.asarray(decode_image(self.file(i).read_bytes())) for i in indices])


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
    """
    order = np.arange(count) if shuffle_seed is None else np.random.default_rng(shuffle_seed).permutation(count)
    height, width, _ = folder.read([0])[0].shape
    beside = {"index": order} | ({} if labels is None else {"labels": labels[order]})
    with (
        replacing(path) as unfinished,
        zipfile.ZipFile(unfinished, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, height, width, 3)}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in range(0, count, chunk):
                stream.write(folder.read(order[start : start + chunk].tolist()).tobytes())
        for name, array in beside.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
