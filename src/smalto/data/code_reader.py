"""Packed codes in place: any rows of one split, verified as they are read."""

import os
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.row_sums import SUMS, have_sums, row_sums
from smalto.data.shards import Member, ShardFiles, map_member, tar_members
from smalto.errors import InputError


class CodeReader:
    """Codes of one split by image number; nothing is read before it is asked for.

    What is kept is the place of each block, the labels, and the checksum of each row (40 bytes an image with ten
    crops); the codes of an image in one crop are one read in the tar.

    Args:
        path: folder of code shards.
        meta: its meta.json.
        split: ``train`` or ``val``; a split that is not there is empty.
        verify: compare every row that is read with its checksum, where the shard has them.

    Attributes:
        labels: int32 (N,).
        unverified: shards without checksums, as meta.json has them: written before there were any.

    Raises:
        ValueError: a shard holds other than what meta.json says.
    """

    def __init__(self, path: str | Path, meta: dict[str, Any], split: str, *, verify: bool = True) -> None:
        self._num_crops = len(meta["crops"])
        self._num_tokens = sum(height * width for height, width in meta["code_shape"])
        self._dtype = np.dtype(meta["dtype"])
        self._codebook_size: int = meta["codebook_size"]
        shards = meta["splits"].get(split, {"shards": []})["shards"]
        self._files = ShardFiles([Path(path) / shard["name"] for shard in shards])
        counts: list[int] = []  # images of each block
        blocks: list[tuple[int, int]] = []  # shard and offset of each
        labels = [np.zeros(0, np.int32)]
        sums: list[np.ndarray | None] = []  # of each shard
        for number, (file, shard) in enumerate(zip(self._files.paths, shards, strict=True)):
            before, found = sum(counts), None
            for member in tar_members(file):
                if member.name.endswith(".label.npy"):
                    labels.append(_labels(map_member(file, member), member, file))
                elif member.name.endswith(".codes.npy"):
                    block = map_member(file, member)
                    self._check(block, member, file)
                    blocks.append((number, block.offset))
                    counts.append(len(block))
                elif member.name == SUMS and verify:
                    found = np.array(map_member(file, member), np.uint32)
            if sum(counts) - before != shard["num_images"]:
                raise InputError(
                    f"{file} holds codes of {sum(counts) - before} images, meta.json says {shard['num_images']}; "
                    "extract it again with overwrite=true"
                )
            images = sum(counts) - before
            sums.append(found if found is not None and found.shape == (images, self._num_crops) else None)
        self.unverified = [shard for shard, has in zip(shards, sums, strict=True) if has is None]
        self._sums = self._row_sums(sums, shards)
        self._has_sums = np.array([has is not None for has in sums], bool)
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # image of each block, and the total
        self._shard, self._offset = np.array(blocks, np.int64).reshape(-1, 2).T
        self.labels = np.concatenate(labels)
        if len(self.labels) != len(self):
            raise InputError(f"{path} holds {len(self.labels)} labels for the codes of {len(self)} images of {split}")

    def __len__(self) -> int:
        return int(self._first[-1])

    def _row_sums(self, sums: list[np.ndarray | None], shards: list[dict[str, Any]]) -> np.ndarray | None:
        """Of all images, uint32 (N, crops), zeros where a shard has none; None where no shard has."""
        if all(found is None for found in sums):
            return None
        shapes = [(shard["num_images"], self._num_crops) for shard in shards]
        none = [np.zeros(shape, np.uint32) for shape in shapes]
        return np.concatenate([z if found is None else found for found, z in zip(sums, none, strict=True)])

    def _check(self, block: np.memmap, member: Member, file: Path) -> None:
        if block.dtype != self._dtype or block.shape[1:] != (self._num_crops, self._num_tokens):
            raise InputError(
                f"{member.name} in {file} is {block.dtype} {block.shape}, meta.json says {self._dtype} "
                f"(n, {self._num_crops}, {self._num_tokens}); extract it again with overwrite=true"
            )

    def gather(self, indices: np.ndarray, crops: np.ndarray, *, distinct: bool = False) -> np.ndarray:
        """Codes of images ``indices``, each in its crop: int64 (B, tokens).

        Args:
            indices: (B,) image numbers.
            crops: (B,) numbers of stored crops.
            distinct: no image is there twice; then verifying is quicker.

        Raises:
            ValueError: a shard became shorter since it was opened, or other codes are in it than were written.
        """
        block = np.searchsorted(self._first, indices, side="right") - 1
        size = self._num_tokens * self._dtype.itemsize
        offsets = self._offset[block] + ((indices - self._first[block]) * self._num_crops + crops) * size
        files = np.array([self._files.descriptor(number) for number in range(len(self._files.paths))])
        rows = b"".join(map(os.pread, files[self._shard[block]].tolist(), repeat(size), offsets.tolist()))
        if len(rows) != size * len(indices):
            raise InputError(f"a shard of {self._files.paths[0].parent} was cut short while it was in use; restore it")
        if self._sums is not None:
            self._verify(rows, indices, crops, distinct=distinct)
        codes = np.frombuffer(rows, self._dtype)
        if len(codes) and codes.max() >= self._codebook_size:
            raise InputError(
                f"{self._files.paths[0].parent} holds the code {codes.max()}, its codebook has {self._codebook_size}; "
                "extract it again with overwrite=true"
            )
        return codes.reshape(len(indices), self._num_tokens).astype(np.int64)

    def _verify(self, rows: bytes, indices: np.ndarray, crops: np.ndarray, *, distinct: bool) -> None:
        assert self._sums is not None
        labels, expected = self.labels[indices], self._sums[indices, crops]
        if distinct and not self.unverified and have_sums(rows, labels, expected):
            return
        shard = self._shard[np.searchsorted(self._first, indices, side="right") - 1]
        wrong = (row_sums(rows, labels) != expected) & self._has_sums[shard]
        if wrong.any():
            place = int(wrong.argmax())
            raise InputError(
                f"{self._files.paths[shard[place]]} is damaged: the codes of image {indices[place]} in crop "
                f"{crops[place]}, or its label, are not what was written; restore the file, or extract again with "
                "overwrite=true (data.verify=false takes them as they are)"
            )


def _labels(stored: np.memmap, member: Member, file: Path) -> np.ndarray:
    """Of one block, int32 (n,)."""
    sound = stored.ndim == 1 and stored.dtype.kind in "iu"
    if not sound or (len(stored) and not -1 <= int(stored.min()) <= int(stored.max()) < 2**31):
        raise InputError(
            f"{member.name} in {file} holds no labels ({stored.dtype} {stored.shape}); extract it again with "
            "overwrite=true"
        )
    return np.array(stored, np.int32)
