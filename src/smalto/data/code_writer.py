"""Encoding the images of a folder of shards into code shards, a block at a time, continued after a kill."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from smalto.data.codes import add_code_block, add_row_sums, code_dtype
from smalto.data.crops import CROPS, Crops
from smalto.data.output import OutputFolder
from smalto.data.output_plan import PARTS
from smalto.data.progress import Advance, progress
from smalto.data.ranks import Ranks
from smalto.data.reader import ImageReader
from smalto.data.text_blocks import LENGTH, TEXT, read_features
from smalto.data.transforms import to_float
from smalto.data.write import TarShard, npy_bytes
from smalto.errors import InputError, StorageError
from smalto.files import write_bytes


class CodeWriter:
    """Encodes one split after the other into ``folder``, alone or with other ranks.

    A block is saved as soon as it is encoded (in the folder ``parts``), and the first rank makes a shard of blocks when
    all of its are there. Blocks begin at fixed images, so what is in a forward pass depends neither on earlier
    interruptions nor on the number of ranks.

    Args:
        folder: open for the first rank; the others only add blocks to it.
        ranks: who shares the work.
        readers: images of each split.
        text: folder of text features, ``SPLIT/KEY.npy`` for the image with that key; None: no text.
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
        ranks: Ranks,
        readers: Mapping[str, ImageReader],
        text: Path | None,
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
        self._ranks, self._readers, self._text = ranks, readers, text
        self._codebook_size, self._num_tokens = codebook_size, num_tokens
        self._image_size, self._ranges, self._names = image_size, list(ranges), CROPS[crops]
        self._num_crops = len(self._ranges) * len(self._names)
        self._images_per_pass = max(1, batch_size // self._num_crops)
        self._block_size, self._blocks_per_shard = block_size, shard_size // block_size
        self._workers = workers

    def write(self) -> dict[str, Any]:
        """Encode what is missing and write the shards.

        Returns:
            ``splits`` of meta.json; only to be used in the first rank.

        Raises:
            ValueError: the tokenizer gives codes of another shape or range than it states.
            OSError: the file system does not show yet what other ranks wrote.
        """
        ranks = self._ranks
        blocks = {split: self._blocks(len(reader)) for split, reader in self._readers.items()}
        # decided by one: others may look when the first blocks are already part of a shard
        missing: dict[str, list[int]] = ranks.share(
            {split: [n for n in range(len(blocks[split])) if not self._is_done(split, n)] for split in blocks}
        )
        self._folder.path.joinpath(PARTS).mkdir(exist_ok=True)
        mine = {split: numbers[ranks.rank :: ranks.world_size] for split, numbers in missing.items()}
        total = sum(len(block) for parts in blocks.values() for block in parts)
        left = {split: sum(len(blocks[split][n]) for n in numbers) for split, numbers in mine.items()}
        everything = total if ranks.world_size == 1 else sum(left.values())
        with progress("extract", total=everything, done=everything - sum(left.values())) as advance:
            for split, reader in self._readers.items():
                self._write_blocks(split, reader, blocks[split], mine[split], advance)
        ranks.wait()
        return {split: self._finish(split, reader, blocks[split]) for split, reader in self._readers.items()}

    def _write_blocks(
        self, split: str, reader: ImageReader, blocks: list[np.ndarray], numbers: list[int], advance: Advance
    ) -> None:
        encoded = self._encode(reader, [blocks[number] for number in numbers], advance)
        keys = reader.keys() if self._text is not None and numbers else []
        for number, codes in zip(numbers, encoded, strict=True):
            if self._text is not None:
                features, lengths = read_features(self._text / split, [keys[i] for i in blocks[number]])
                write_bytes(self._part(split, number, TEXT), npy_bytes(features))
                write_bytes(self._part(split, number, LENGTH), npy_bytes(lengths))
            write_bytes(self._part(split, number), npy_bytes(codes))  # last: with it the block counts as done
            if self._ranks.first:
                self._pack(split, number // self._blocks_per_shard, blocks, reader.labels)

    def _finish(self, split: str, reader: ImageReader, blocks: list[np.ndarray]) -> dict[str, Any]:
        shards = []
        if self._ranks.first:
            for shard in range(-(-len(blocks) // self._blocks_per_shard)):
                self._pack(split, shard, blocks, reader.labels)
                name = f"{split}-{shard:05d}.tar"
                if name not in self._folder.done:
                    raise StorageError(
                        f"blocks of {name} that other processes wrote to {self._folder.path} are not to be seen here; "
                        "run the same command again when the file system shows them"
                    )
                shards.append(self._folder.done[name])
        return {"num_images": len(reader), "shards": shards}

    def _blocks(self, num_images: int) -> list[np.ndarray]:
        cuts = range(self._block_size, num_images, self._block_size)
        return np.split(np.arange(num_images), cuts)

    def _part(self, split: str, block: int, kind: str = "npy") -> Path:
        return self._folder.path / PARTS / f"{split}-{block:06d}.{kind}"

    def _is_done(self, split: str, block: int) -> bool:
        shard = f"{split}-{block // self._blocks_per_shard:05d}.tar"
        return shard in self._folder.done or self._is_part(split, block)

    def _is_part(self, split: str, block: int) -> bool:
        """Whether the block is there; a file without its end is not."""
        try:
            for kind in ("npy", *((TEXT, LENGTH) if self._text is not None else ())):
                np.load(self._part(split, block, kind), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return True

    def _pack(self, split: str, shard: int, blocks: list[np.ndarray], labels: np.ndarray) -> None:
        """Make the shard once all its blocks are there."""
        name = f"{split}-{shard:05d}.tar"
        first = shard * self._blocks_per_shard
        numbers = range(first, min(first + self._blocks_per_shard, len(blocks)))
        parts = [self._part(split, number) for number in numbers]
        if name in self._folder.done or not all(self._is_part(split, number) for number in numbers):
            return
        sums = []
        with TarShard(self._folder.path / name) as tar:
            for number, part in zip(numbers, parts, strict=True):
                sums.append(add_code_block(tar, number, np.load(part), labels[blocks[number]]))
                for kind in (TEXT, LENGTH) if self._text is not None else ():
                    tar.add(f"{number:06d}.{kind}", self._part(split, number, kind).read_bytes())
            add_row_sums(tar, sums)
            record = tar.close()
        self._folder.record({**record, "num_images": sum(len(blocks[number]) for number in numbers)})
        for number, part in zip(numbers, parts, strict=True):
            part.unlink()
            for kind in (TEXT, LENGTH):
                self._part(split, number, kind).unlink(missing_ok=True)

    @torch.inference_mode()
    def _encode(self, reader: ImageReader, blocks: list[np.ndarray], advance: Advance) -> Iterator[np.ndarray]:
        """Codes (n, crops, L) of each block, as stored."""
        passes = [
            block[i : i + self._images_per_pass]
            for block in blocks
            for i in range(0, len(block), self._images_per_pass)
        ]
        images = DataLoader(
            Crops(reader, passes, self._image_size, self._ranges, self._names),
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
            raise InputError(
                f"the tokenizer gave codes of shape {tuple(codes.shape)} for {len(crops)} images of "
                f"{self._image_size} pixels; its code_shape says {self._num_tokens} codes each"
            )
        found = codes.cpu().numpy()  # the one wait for the device
        lowest, highest = int(found.min()), int(found.max())
        if lowest < 0 or highest >= self._codebook_size:
            raise InputError(
                f"the tokenizer gave codes from {lowest} to {highest}; its codebook has {self._codebook_size}"
            )
        stored = found.astype(code_dtype(self._codebook_size))
        return stored.reshape(-1, self._num_crops, self._num_tokens)
