"""Features of many images in files, so that a long measurement survives a kill and can be shared by processes."""

import io
import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from smalto.arrays import npz_array
from smalto.files import write_bytes
from smalto.metrics.features import Features

log = logging.getLogger(__name__)

BLOCK_SIZE = 500
_ARRAYS = {"label", *(field.name for field in fields(Features))}


class FeatureBlocks:
    """A folder with one file per block of consecutive images; a file is whole or absent.

    The blocks are the same whatever the batch size and the number of processes, and with them every metric.

    Args:
        path: the folder; made when the first block is written.
        count: images in all.
        edges: image numbers at which a block must end: what is measured at these counts needs no part of a block.
        size: images per block.
    """

    def __init__(self, path: Path, *, count: int, edges: Sequence[int] = (), size: int = BLOCK_SIZE) -> None:
        self._path = path
        cuts = sorted({0, count, *range(0, count, size), *(edge for edge in edges if edge < count)})
        self.blocks = [range(a, b) for a, b in itertools.pairwise(cuts)]

    def missing(self, *, rank: int = 0, world_size: int = 1) -> list[range]:
        """Blocks of this process that are not written yet, or cannot be read: those are removed, with a warning."""
        return [block for block in self.blocks[rank::world_size] if not self._is_whole(block)]

    def write(self, block: range, features: Features, label: Tensor | None) -> None:
        """Keep the features of a block, and the labels (B,) asked for if there are any."""
        arrays = {name: value.cpu().numpy() for name, value in vars(features).items()}
        if label is not None:
            arrays["label"] = label.cpu().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        self._path.mkdir(parents=True, exist_ok=True)
        write_bytes(self._file(block), buffer.getvalue())

    def read(self) -> Iterator[tuple[range, Features, Tensor | None]]:
        """All blocks in order."""
        for block in self.blocks:
            yield block, *self._load(block)

    def remove(self) -> None:
        """They have served."""
        for block in self.blocks:
            self._file(block).unlink(missing_ok=True)
        if self._path.is_dir() and not os.listdir(self._path):
            self._path.rmdir()

    def _load(self, block: range) -> tuple[Features, Tensor | None]:
        file = self._file(block)
        with ZipFile(file) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()} & _ARRAYS
        arrays = {name: torch.from_numpy(np.array(npz_array(file, name, mapped=False, packed=False))) for name in names}
        if {len(array) for array in arrays.values()} != {len(block)}:
            raise ValueError(f"it does not hold {len(block)} images")
        label = arrays.pop("label", None)
        return Features(**arrays), label

    def _is_whole(self, block: range) -> bool:
        try:
            self._load(block)
        except FileNotFoundError:
            return False
        except Exception as error:  # a damaged file fails in ways that are nobody's list
            log.warning("%s cannot be read (%s); its images are measured again", self._file(block), error)
            self._file(block).unlink(missing_ok=True)
            return False
        return True

    def _file(self, block: range) -> Path:
        return self._path / f"{block.start:08d}-{block.stop:08d}.npz"
