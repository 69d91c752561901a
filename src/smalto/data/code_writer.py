"""Encoding the images of a folder of shards into code shards, a block at a time, continued after a kill."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smalto.data.codes import add_code_block, code_dtype
from smalto.data.output import PARTS, OutputFolder
from smalto.data.progress import Advance
from smalto.data.reader import ImageReader
from smalto.data.transforms import TEN_CROPS, named_crops, to_float
from smalto.data.write import TarShard, npy_bytes, write_bytes

CROPS = {"ten": TEN_CROPS, "center_flip": ("center", "center_flip"), "center": ("center",)}


def crop_names(crops: str, ranges: Sequence[float]) -> list[str]:
    """Names of the stored crops in their order; with several ranges each name ends in ``@range``."""
    if len(ranges) == 1:
        return list(CROPS[crops])
    return [f"{name}@{crop_range:g}" for crop_range in ranges for name in CROPS[crops]]


class CodeWriter:
    """Encodes one split after the other into ``folder``.

    A block is saved as soon as it is encoded (in the folder ``parts``) and blocks become a shard when
    all of its are there. Blocks begin at fixed images, so what is in a forward pass does not depend on
    earlier interruptions.

    Args:
        folder: open for this process.
        encode: of the tokenizer: float (B, 3, S, S) in [-1, 1] on ``device`` to int64 (B, L).
        codebook_size: all codes are below.
        num_tokens: L.
        image_size: S.
        crops: ``ten``, ``center_flip`` or ``center``.
        ranges: the image is scaled to ``int(S * range)`` before a crop is taken; each range gives all crops.
        batch_size: crops in a forward pass; at least one image with all its crops.
        block_size: images in a block.
        shard_size: images in a shard, a multiple of ``block_size``.
        workers: processes that decode and crop; 0: this one.
        device: of the forward pass.
    """

    def __init__(
        self,
        *,
        folder: OutputFolder,
        encode: Callable[[Tensor], Tensor],
        codebook_size: int,
        num_tokens: int,
        image_size: int,
        crops: str,
        ranges: Sequence[float],
        batch_size: int,
        block_size: int,
        shard_size: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._folder, self._encode_images, self._device = folder, encode, device
        self._codebook_size, self._num_tokens = codebook_size, num_tokens
        self._image_size, self._ranges, self._names = image_size, list(ranges), CROPS[crops]
        self._num_crops = len(self._ranges) * len(self._names)
        self._images_per_pass = max(1, batch_size // self._num_crops)
        self._block_size, self._blocks_per_shard = block_size, shard_size // block_size
        self._workers = workers

    def done(self, split: str, num_images: int) -> int:
        """Images of ``split`` whose codes an earlier run saved."""
        blocks = self._blocks(num_images)
        return sum(len(block) for number, block in enumerate(blocks) if self._is_done(split, number))

    def write(self, split: str, reader: ImageReader, advance: Advance) -> dict[str, Any]:
        """Encode what is missing of ``split`` and write its shards.

        Returns:
            The entry of the split in meta.json.

        Raises:
            ValueError: the tokenizer gives codes of another shape or range than it states.
        """
        blocks = self._blocks(len(reader))
        missing = [number for number in range(len(blocks)) if not self._is_done(split, number)]
        self._folder.path.joinpath(PARTS).mkdir(exist_ok=True)
        encoded = self._encode(reader, [blocks[number] for number in missing], advance)
        for number, codes in zip(missing, encoded, strict=True):
            write_bytes(self._part(split, number), npy_bytes(codes))
            self._pack(split, number // self._blocks_per_shard, blocks, reader.labels)
        shards = []
        for shard in range(-(-len(blocks) // self._blocks_per_shard)):
            self._pack(split, shard, blocks, reader.labels)  # when killed between the last block and the shard
            shards.append(self._folder.done[f"{split}-{shard:05d}.tar"])
        return {"num_images": len(reader), "shards": shards}

    def _blocks(self, num_images: int) -> list[np.ndarray]:
        cuts = range(self._block_size, num_images, self._block_size)
        return np.split(np.arange(num_images), cuts)

    def _part(self, split: str, block: int) -> Path:
        return self._folder.path / PARTS / f"{split}-{block:06d}.npy"

    def _is_done(self, split: str, block: int) -> bool:
        shard = f"{split}-{block // self._blocks_per_shard:05d}.tar"
        return shard in self._folder.done or self._part(split, block).exists()

    def _pack(self, split: str, shard: int, blocks: list[np.ndarray], labels: np.ndarray) -> None:
        """Make the shard once all its blocks are there."""
        name = f"{split}-{shard:05d}.tar"
        first = shard * self._blocks_per_shard
        numbers = range(first, min(first + self._blocks_per_shard, len(blocks)))
        parts = [self._part(split, number) for number in numbers]
        if name in self._folder.done or not all(part.exists() for part in parts):
            return
        with TarShard(self._folder.path / name) as tar:
            for number, part in zip(numbers, parts, strict=True):
                add_code_block(tar, number, np.load(part), labels[blocks[number]])
            record = tar.close()
        self._folder.record({**record, "num_images": sum(len(blocks[number]) for number in numbers)})
        for part in parts:
            part.unlink()

    @torch.inference_mode()
    def _encode(self, reader: ImageReader, blocks: list[np.ndarray], advance: Advance) -> Iterator[np.ndarray]:
        """Codes (n, crops, L) of each block, as stored."""
        passes = [
            block[i : i + self._images_per_pass]
            for block in blocks
            for i in range(0, len(block), self._images_per_pass)
        ]
        images = DataLoader(
            _Crops(reader, passes, self._image_size, self._ranges, self._names),
            batch_size=None,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),
        )
        ready, sizes = [], iter(len(block) for block in blocks)
        size, filled = next(sizes, 0), 0
        for crops in images:
            ready.append(self._encode_crops(crops))
            filled += len(ready[-1])
            advance(len(ready[-1]))
            if filled == size:
                yield np.concatenate(ready)
                ready, filled, size = [], 0, next(sizes, 0)

    def _encode_crops(self, crops: Tensor) -> np.ndarray:
        codes = self._encode_images(to_float(crops.to(self._device, non_blocking=True)))
        if codes.shape != (len(crops), self._num_tokens):
            raise ValueError(
                f"the tokenizer gave codes of shape {tuple(codes.shape)} for {len(crops)} images of "
                f"{self._image_size} pixels; its code_shape says {self._num_tokens} codes each"
            )
        lowest, highest = int(codes.min()), int(codes.max())
        if lowest < 0 or highest >= self._codebook_size:
            raise ValueError(
                f"the tokenizer gave codes from {lowest} to {highest}; its codebook has {self._codebook_size}"
            )
        stored = codes.cpu().numpy().astype(code_dtype(self._codebook_size))
        return stored.reshape(-1, self._num_crops, self._num_tokens)


class _Crops(Dataset):
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
