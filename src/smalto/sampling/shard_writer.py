"""Samples as a WebDataset: the image shards that ``smalto prepare`` writes, made while drawing."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from smalto.data.output import OutputFolder
from smalto.data.write import TarShard
from smalto.sampling.service import ImageBatch

Draw = Callable[[Sequence[int]], Iterator[ImageBatch]]
"""Images by their numbers, in batches and in order."""


class SampleShards:
    """Files ``train-00000.tar``, ...: image i and its label under the key of its number, as PNG.

    One batch is in memory. A shard appears whole or not at all: a killed job draws the shard it was at again.

    Args:
        folder: open for this process; keeps the records of finished shards.
        count: images in all.
        shard_size: images in a shard.
    """

    def __init__(self, folder: OutputFolder, *, count: int, shard_size: int) -> None:
        self._folder = folder
        self._shards = {
            f"train-{number:05d}.tar": range(start, min(start + shard_size, count))
            for number, start in enumerate(range(0, count, shard_size))
        }

    def missing(self) -> dict[str, range]:
        """Image numbers of the shards that are not finished."""
        return {name: indices for name, indices in self._shards.items() if name not in self._folder.done}

    def write(self, draw: Draw, advance: Callable[[int], None]) -> None:
        """Draw and write what is missing; ``advance`` hears how many images were written."""
        for name, indices in self.missing().items():
            with TarShard(self._folder.path / name) as shard:
                for batch in draw(indices):
                    _add(shard, batch)
                    advance(len(batch.indices))
                record = shard.close()
            self._folder.record(record | {"num_images": len(indices)})

    def splits(self) -> dict[str, Any]:
        """The ``splits`` entry of meta.json."""
        shards = [self._folder.done[name] for name in self._shards]
        return {"train": {"num_images": sum(shard["num_images"] for shard in shards), "shards": shards}}


def _add(shard: TarShard, batch: ImageBatch) -> None:
    assert batch.labels is not None
    pixels = batch.images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    for i, label, image in zip(batch.indices, batch.labels.tolist(), pixels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        shard.add(f"{i:08d}.png", file.getvalue())
        shard.add(f"{i:08d}.cls", str(label).encode())
