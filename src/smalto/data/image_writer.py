"""Images of a source into the shards of a folder: parallel, in a fixed order, continued where it stopped."""

import json
import logging
import unicodedata
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import numpy as np

from smalto.data.encode import EncodeChunk, Encoded, Item, Recipe
from smalto.data.output import OutputFolder
from smalto.data.output_plan import REJECTED
from smalto.data.pool import ordered_map
from smalto.data.progress import progress
from smalto.data.sources import Source
from smalto.data.write import TarShard
from smalto.errors import InputError
from smalto.files import write_bytes

log = logging.getLogger(__name__)

CHUNK = 64  # images a worker gets at a time
_SHOWN = 5  # classes that a warning names


class ImageWriter:
    """Writes the shards of one job.

    Args:
        folder: open for this process.
        source: read here, in order; decoding and encoding happen in the workers.
        recipe: of the images.
        workers: processes; 0 works here.
        max_rejected: unusable images before it is an error.
    """

    def __init__(
        self, *, folder: OutputFolder, source: Source, recipe: Recipe, workers: int, max_rejected: int
    ) -> None:
        self._folder, self._source, self._recipe = folder, source, recipe
        self._workers, self._max_rejected = workers, max_rejected
        self._rejected = [r for shard in folder.done.values() for r in shard["rejected"]]

    def write(self, splits: dict[str, np.ndarray], shard_size: int) -> None:
        """Write the shards that are not there yet.

        Args:
            splits: record numbers of each split in the order they are stored.
            shard_size: records in a shard; one that is rejected leaves its shard smaller and its key unused.

        Raises:
            ValueError: more images rejected than allowed; they are named in rejected.jsonl.
        """
        todo = [
            (f"{split}-{number:05d}.tar", start, order[start : start + shard_size])
            for split, order in splits.items()
            for number, start in enumerate(range(0, len(order), shard_size))
        ]
        total = sum(len(records) for _, _, records in todo)
        todo = [shard for shard in todo if shard[0] not in self._folder.done]
        done = total - sum(len(records) for _, _, records in todo)
        with (
            progress("prepare", total=total, done=done) as advance,
            closing(self._encoded(todo)) as chunks,
        ):
            for name, group in groupby(chunks, key=itemgetter(0)):
                self._write_shard(name, (chunk for _, chunk in group), advance)

    def meta_splits(self, splits: dict[str, np.ndarray]) -> dict[str, Any]:
        """The ``splits`` entry of meta.json."""
        meta = {}
        for split in splits:
            shards = [
                {key: record[key] for key in ("name", "num_images", "bytes", "sha256")}
                for name, record in sorted(self._folder.done.items())
                if name.startswith(f"{split}-")
            ]
            meta[split] = {"num_images": sum(s["num_images"] for s in shards), "shards": shards}
        return meta

    def describe(self, classes: list[str]) -> dict[str, Any]:
        """What meta.json says of the images as a whole, from the records of the finished shards.

        Raises:
            ValueError: no image could be used, only some have labels, or labels outside ``classes``.
        """
        records = self._folder.done.values()
        if self._rejected:
            self._write_rejected()
            log.warning("%d images left out, named in %s", len(self._rejected), self._folder.path / REJECTED)
        num_images = sum(record["num_images"] for record in records)
        labelled = sum(record["labelled"] for record in records)
        largest = max((record["max_label"] for record in records), default=-1)
        if num_images == 0:
            self._folder.discard()
            raise InputError(
                f"no image of the source could be used ({len(self._rejected)} rejected"
                + (f"; the first: {self._rejected[0]['name']}: {self._rejected[0]['reason']}" if self._rejected else "")
                + "); check source.path"
            )
        smallest = min((record.get("min_label", 0) for record in records if record["labelled"]), default=0)
        if smallest < 0:
            raise InputError(f"a label is {smallest}; labels count from 0: leave it empty where there is no label")
        if labelled not in (0, num_images):
            raise InputError(
                f"{num_images - labelled} of {num_images} images have no label; give all of them "
                "one, or none "
                "(labels are not needed to train a tokenizer)"
            )
        if labelled and classes and largest >= len(classes):
            raise InputError(
                f"a label is {largest} but the source names {len(classes)} classes; correct source.classes"
            )
        sizes = {tuple(size) for record in records for size in record["sizes"]}
        num_classes = (len(classes) or largest + 1) if labelled else None
        self._tell_of_classes(num_classes or 0, classes)
        return {
            "num_classes": num_classes,
            "classes": classes,
            "captions": any(record["captions"] for record in records),
            "image_size": list(sizes.pop()) if len(sizes) == 1 else None,
            "rejected": len(self._rejected),
        }

    def _tell_of_classes(self, num_classes: int, classes: list[str]) -> None:
        """Warn of what is allowed and seldom meant."""
        records = self._folder.done.values()
        if num_classes and all("labels" in record for record in records):  # not in folders that an older version began
            seen = {label for record in records for label in record["labels"]}
            empty = list(islice((number for number in range(num_classes) if number not in seen), _SHOWN + 1))
            if empty == [0] and not classes and not self._rejected:
                log.warning(
                    "the labels run from 1 to %d: class 0 is empty, and there are %d classes; subtract 1 from the "
                    "labels if that is not meant",
                    num_classes - 1,
                    num_classes,
                )
            elif empty:
                shown = [f"{n} ({classes[n]})" if classes else str(n) for n in empty[:_SHOWN]]
                log.warning(
                    "%d of %d classes have no images: %s%s",
                    num_classes - len(seen),
                    num_classes,
                    ", ".join(shown),
                    ", ..." if len(empty) > _SHOWN else "",
                )
        for name, count in Counter(classes).items():
            if count > 1:
                log.warning(
                    "classes %s are all called %s: only their numbers tell them apart",
                    ", ".join(str(number) for number, other in enumerate(classes) if other == name),
                    name,
                )
        alike: dict[str, list[str]] = {}
        for name in dict.fromkeys(classes):
            alike.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
        for found in alike.values():
            if len(found) > 1:
                log.warning("classes are called %s: nearly the same, and not one class", ", ".join(map(repr, found)))
        blank = [name for name in classes if name.strip().lower() in ("nan", "null", "none", "<na>")]
        if blank:
            log.warning("classes are called %s: if that says there is no label, leave it empty", ", ".join(blank))

    def _encoded(self, todo: list[tuple[str, int, np.ndarray]]) -> Generator[tuple[str, list[Encoded]], None, None]:
        """Results in order, each with the name of its shard."""
        names: deque[str] = deque()  # of the chunks in flight

        def chunks() -> Iterator[list[Item]]:
            for name, first, records in todo:
                for start in range(0, len(records), CHUNK):
                    names.append(name)
                    part = records[start : start + CHUNK]
                    yield [self._read(int(r), f"{first + start + i:08d}") for i, r in enumerate(part)]

        with closing(ordered_map(EncodeChunk(self._recipe), chunks(), workers=self._workers)) as results:
            for result in results:
                yield names.popleft(), result

    def _read(self, index: int, key: str) -> Item:
        name = self._source.name(index)
        try:
            return Item(key, name, self._source[index])
        except (OSError, ValueError) as error:
            return Item(key, name, None, f"not readable: {error}")

    def _write_shard(self, name: str, chunks: Iterator[list[Encoded]], advance: Any) -> None:
        sizes: set[tuple[int, int]] = set()
        labels: list[int | None] = []
        captions, before = 0, len(self._rejected)
        with TarShard(self._folder.path / name) as shard:
            for chunk in chunks:
                for image in chunk:
                    if image.data is None:
                        self._reject(image)
                        continue
                    shard.add(f"{image.key}.{self._recipe.encoding}", image.data)
                    if image.label is not None:
                        shard.add(f"{image.key}.cls", str(image.label).encode())
                    if image.caption is not None:
                        shard.add(f"{image.key}.txt", image.caption.encode())
                    labels.append(image.label)
                    captions += image.caption is not None
                    if len(sizes) < 2:
                        sizes.add(image.size)
                advance(len(chunk))
            record = shard.close()
        known = [label for label in labels if label is not None]
        self._folder.record(
            {
                **record,
                "num_images": len(labels),
                "labelled": len(known),
                "max_label": max(known, default=-1),
                "min_label": min(known, default=0),
                "labels": sorted(set(known)),
                "captions": captions,
                "sizes": sorted(sizes),
                "rejected": self._rejected[before:],
            }
        )

    def _reject(self, image: Encoded) -> None:
        self._rejected.append({"name": image.name, "reason": image.reason})
        if len(self._rejected) > self._max_rejected:
            self._write_rejected()
            raise InputError(
                f"{len(self._rejected)} images could not be used, max_rejected is "
                f"{self._max_rejected}; the last is "
                f"{image.name}: {image.reason}. All are named in {self._folder.path / REJECTED}; "
                "repair them or raise "
                "max_rejected, then run the same command again"
            )

    def _write_rejected(self) -> None:
        lines = "".join(json.dumps(r) + "\n" for r in self._rejected)
        write_bytes(self._folder.path / REJECTED, lines.encode())
