"""Which crops of an image are encoded, and how they are called in code shards."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from smalto.data.output import OutputFolder
from smalto.data.reader import ImageReader
from smalto.data.transforms import TEN_CROPS, named_crops

log = logging.getLogger(__name__)

CROPS = {"ten": TEN_CROPS, "center_flip": ("center", "center_flip"), "center": ("center",)}
KINDS = {len(names): kind for kind, names in CROPS.items()}
"""Of a number of crops."""


def crop_names(crops: str, ranges: Sequence[float]) -> list[str]:
    """Names of the stored crops in their order; with several ranges each name ends in ``@range``."""
    if len(ranges) == 1:
        return list(CROPS[crops])
    return [f"{name}@{crop_range:g}" for crop_range in ranges for name in CROPS[crops]]


def codes_summary(folder: OutputFolder, status: str, crops: list[str]) -> dict[str, Any]:
    """What ``smalto extract`` returns of a folder of code shards, and its last line."""
    counts = {split: entry["num_images"] for split, entry in (folder.finished or {"splits": {}})["splits"].items()}
    if counts:
        log.info("%s: %s, %s images, %d crops each", folder.path, status, counts, len(crops))
    return {
        "out": str(folder.path),
        "status": status,
        "num_train": counts.get("train", 0),
        "num_val": counts.get("val", 0),
        "crops": crops,
    }


class Crops(Dataset):
    """Item i: the crops of the images of forward pass i, uint8 (n * crops, 3, S, S)."""

    def __init__(
        self,
        reader: ImageReader,
        passes: list[np.ndarray],
        size: int,
        ranges: list[float],
        names: Sequence[str],
    ) -> None:
        self._reader, self._passes = reader, passes
        self._size, self._ranges, self._names = size, ranges, names

    def __len__(self) -> int:
        return len(self._passes)

    def __getitem__(self, index: int) -> Tensor:
        crops = [
            named_crops(image, self._size, crop_range, self._names)
            for image in map(self._reader.read, map(int, self._passes[index]))
            for crop_range in self._ranges
        ]
        return torch.from_numpy(np.concatenate(crops)).permute(0, 3, 1, 2).contiguous()
