"""Text features beside codes: of each block all valid tokens in one array, and how many belong to each image."""

from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.foreign import reading
from smalto.data.shards import ShardFiles, map_member, tar_members
from smalto.errors import InputError, MissingFile

TEXT, LENGTH = "text.npy", "text_length.npy"
"""Suffixes of the members: float16 (sum of lengths, C) and int32 (n,)."""


def read_features(folder: Path, keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Features of some images, one ``KEY.npy`` each of float (n, C) or (1, n, C), without padding.

    Returns:
        float16 (sum of n, C) and int32 (len(keys),).

    Raises:
        FileNotFoundError: an image has no file.
        ValueError: a file of another shape, without tokens, or beyond the range of float16.
    """
    rows: list[np.ndarray] = []
    for key in keys:
        path = folder / f"{key}.npy"
        if not path.is_file():
            raise MissingFile(f"no text features at {path}; every image needs one file SPLIT/KEY.npy below text=")
        with reading(f"{path} is not a whole .npy file"):
            features = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: its header may claim any size
        if features.dtype.kind not in "fiu":
            raise InputError(f"{path} holds {features.dtype}; text features are real numbers")
        features = features[0] if features.ndim == 3 and len(features) == 1 else features
        if features.ndim != 2 or not features.size or (rows and features.shape[1] != rows[0].shape[1]):
            width = rows[0].shape[1] if rows else "width"
            raise InputError(f"{path} has shape {features.shape}, must be (tokens, {width}) with at least one token")
        with np.errstate(over="ignore"):
            rows.append(features.astype(np.float16))
        if not np.isfinite(rows[-1]).all():
            raise InputError(f"{path} holds values that float16 cannot (beyond 65504, or not numbers)")
    return np.concatenate(rows), np.array([len(row) for row in rows], np.int32)


def text_dim(path: Path, splits: dict[str, Any]) -> int:
    """Width of the stored features.

    Raises:
        ValueError: blocks of different widths.
    """
    dims = {
        map_member(path / shard["name"], member).shape[1]
        for split in splits.values()
        for shard in split["shards"]
        for member in tar_members(path / shard["name"])
        if member.name.endswith("." + TEXT)
    }
    if len(dims) != 1:
        raise InputError(f"the text features have widths {sorted(dims)}; give features of one text encoder")
    return dims.pop()


class TextReader:
    """Text features of one split by image number, read in place like the codes.

    Args:
        path: folder of code shards.
        meta: its meta.json.
        split: ``train`` or ``val``.

    Raises:
        ValueError: the shards hold no text, or not that of every image.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], split: str) -> None:
        if not meta.get("text"):
            raise InputError(
                f"{path} holds no text features; run smalto extract with text=FOLDER, or set data.condition=label"
            )
        self.dim: int = meta["text"]["dim"]
        shards = meta["splits"].get(split, {"shards": []})["shards"]
        self._files = ShardFiles([Path(path) / shard["name"] for shard in shards])
        blocks: list[tuple[int, int, int]] = []  # shard, offset, tokens
        lengths: list[np.ndarray] = []
        for number, file in enumerate(self._files.paths):
            for member in tar_members(file):
                if member.name.endswith("." + LENGTH):
                    lengths.append(np.array(map_member(file, member)))
                elif member.name.endswith("." + TEXT):
                    block = map_member(file, member)
                    blocks.append((number, block.offset, len(block)))
        self._lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
        self._shard, self._offset, totals = np.array(blocks, np.int64).reshape(-1, 3).T
        self._block = np.repeat(np.arange(len(lengths)), [len(block) for block in lengths])
        starts = [np.cumsum(block) - block for block in lengths]
        self._start = np.concatenate(starts) if starts else np.zeros(0, np.int64)
        expected = sum(shard["num_images"] for shard in shards)
        if len(self._lengths) != expected or totals.tolist() != [int(block.sum()) for block in lengths]:
            raise InputError(
                f"the text features of {split} in {path} do not match its {expected} images; "
                "extract them again with overwrite=true"
            )

    def gather(self, indices: np.ndarray, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Features of images ``indices``: float32 (B, T, C) and bool (B, T), True where there is a token.

        The first ``num_tokens`` tokens of each; shorter texts stand at the end, after zeros, as in LlamaGen.
        """
        text = np.zeros((len(indices), num_tokens, self.dim), np.float32)
        mask = np.zeros((len(indices), num_tokens), bool)
        for row, index in enumerate(indices):
            block, length = self._block[index], min(int(self._lengths[index]), num_tokens)
            offset = int(self._offset[block] + 2 * self.dim * self._start[index])
            data = self._files.read(int(self._shard[block]), 2 * self.dim * length, offset)
            text[row, num_tokens - length :] = np.frombuffer(data, np.float16).reshape(length, self.dim)
            mask[row, num_tokens - length :] = True
        return text, mask
