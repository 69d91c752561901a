"""How many images a training sees in an epoch, and what images and codes take on disk."""

import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.codes import code_dtype
from smalto.data.health import shard_meta
from smalto.data.meta import meta_problems
from smalto.data.shards import META
from smalto.errors import InputError

IMAGENET = 1_281_167
FASHION_MNIST = 9_071  # of the 10,000 embedded ones, the training split of smalto prepare
_ASSUMED = {
    "fashion_mnist": ("Fashion-MNIST's", FASHION_MNIST),
    "fashion_mnist_codes": ("Fashion-MNIST's", FASHION_MNIST),
}

_HEADER = 128
"""Bytes before the data of an .npy file of a small array."""


def training_images(data: dict[str, Any], *, wanted: int | None) -> tuple[int, str]:
    """Images of an epoch, and where the number comes from.

    Args:
        data: the resolved ``data`` node of a config.
        wanted: given by the user; None looks at the data.
    """
    if wanted is not None:
        return wanted, "plan.num_images"
    if "num_train" in data:
        return data["num_train"], "data.num_train"
    if "steps_per_epoch" in data:
        return data["steps_per_epoch"] * data["batch_size"], "data.steps_per_epoch"
    path = Path(str(data.get("path")))
    meta = _sound_meta(path)
    counted = None if meta is None else meta["splits"].get("train", {}).get("num_images")
    if counted is not None:
        return counted, f"{path}/meta.json"
    whose, images = _ASSUMED.get(path.name, ("ImageNet's", IMAGENET))
    return images, f"assumed, {whose}: nothing at {path} yet (plan.num_images=N)"


def _sound_meta(path: Path) -> dict[str, Any] | None:
    meta = shard_meta(path)
    problems = meta_problems(meta) if meta is not None else []
    if problems:
        raise InputError(f"{path / META} is damaged: {'; '.join(problems)}; restore it, or make the data set again")
    return meta


def stored_bytes(data: dict[str, Any]) -> int | None:
    """Of all shards in the folder of ``data``; None when there are none."""
    meta = _sound_meta(Path(str(data.get("path"))))
    if meta is None:
        return None
    return sum(shard["bytes"] for split in meta["splits"].values() for shard in split["shards"])


def code_shard_bytes(
    num_images: int,
    *,
    crops: int,
    num_tokens: int,
    codebook_size: int,
    block_size: int = 4096,
    shard_size: int = 102_400,
) -> int:
    """What ``smalto extract`` writes for one split of ``num_images``: tars of blocks of codes and labels, to the byte.

    Args:
        num_images: of the split.
        crops: sequences stored for each.
        num_tokens: codes of a sequence.
        codebook_size: decides whether a code takes 2 or 4 bytes.
        block_size: images in a block.
        shard_size: images in a shard, a multiple of ``block_size``.
    """
    item = np.dtype(code_dtype(codebook_size)).itemsize

    def member(size: int) -> int:
        return tarfile.BLOCKSIZE + -(-(_HEADER + size) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE

    total = 0
    for first in range(0, num_images, shard_size):
        images = min(shard_size, num_images - first)
        blocks = [min(block_size, images - start) for start in range(0, images, block_size)]
        size = sum(member(n * crops * num_tokens * item) + member(8 * n) for n in blocks) + 2 * tarfile.BLOCKSIZE
        total += -(-size // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    return total
