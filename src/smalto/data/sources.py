"""Where images come from: the interface of all sources, and image files in folders.

A source lists its records cheaply and reads one by number; it decides nothing else. All sources are random
access, so ``smalto prepare`` can mix them.
"""

import csv
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smalto.data.shards import IMAGE_SUFFIXES
from smalto.errors import InputError, MissingFile

Part = tuple[str, str | None, np.ndarray, np.ndarray]
"""Name, split, images uint8 (N, H, W) or (N, H, W, 3), labels (N,)."""


@dataclass(frozen=True)
class Record:
    """One image with what is known of it.

    Args:
        image: a picture, or the bytes of an image file, not decoded yet.
        name: unique and stable in its source; the hash of it decides the split.
        label: class number in [0, num_classes), or None.
        caption: a sentence, or None.
        split: ``train``, ``val``, ``test`` as the source has it, or None.
    """

    image: Image.Image | bytes
    name: str
    label: int | None = None
    caption: str | None = None
    split: str | None = None


class Source(ABC):
    """Images by number.

    Attributes:
        classes: class names in the order of the labels; empty when the source has none.
    """

    classes: Sequence[str]

    @abstractmethod
    def __len__(self) -> int:
        """Number of records."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Record ``index``; OSError or ValueError when this one cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """``self[index].name`` without reading the image."""

    @abstractmethod
    def split(self, index: int) -> str | None:
        """``self[index].split`` without reading the image."""

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All record numbers, shuffled as well as the storage allows at full reading speed."""
        return rng.permutation(len(self))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


class ArraySource(Source):
    """Small sets, read whole: pixels of all images in memory, in named parts."""

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    @abstractmethod
    def load(self) -> list[Part]:
        """Read the files; called once, when the first record is wanted."""

    @cached_property
    def _parts(self) -> list[Part]:
        return self.load()

    def _locate(self, index: int) -> tuple[int, int]:
        for number, (_, _, images, _) in enumerate(self._parts):
            if index < len(images):
                return number, index
            index -= len(images)
        raise IndexError(index)

    def __len__(self) -> int:
        return sum(len(images) for _, _, images, _ in self._parts)

    def name(self, index: int) -> str:
        """Part and number in it."""
        part, row = self._locate(index)
        return f"{self._parts[part][0]}/{row:06d}"

    def split(self, index: int) -> str | None:
        """Of the part."""
        return self._parts[self._locate(index)[0]][1]

    def __getitem__(self, index: int) -> Record:
        part, row = self._locate(index)
        name, split, images, labels = self._parts[part]
        return Record(
            image=Image.fromarray(images[row]),
            name=f"{name}/{row:06d}",
            label=int(labels[row]),
            split=split,
        )


class Folder(Source):
    """Image files under a folder: one subfolder per class, or a table that says what each file is.

    Args:
        path: the folder. Folders ``train`` and ``val`` (or ``test``) directly in it become the split.
        metadata: table beside the images with a column ``path`` (relative to ``path``) and any of ``label``,
            ``caption``, ``split``: ``.jsonl`` (one object a line) or ``.csv`` (with a header). Labels
            are numbers, or names that are numbered in sorted order. None takes the class from the
            subfolder; files directly in ``path`` then have no label.
        classes: names in the order of the labels; None for those found, sorted.

    Raises:
        FileNotFoundError: no folder, no table, no images.
        ValueError: a class outside ``classes``, or a table without ``path``.
    """

    def __init__(
        self, *, path: str | Path, metadata: str | Path | None = None, classes: Sequence[str] | None = None
    ) -> None:
        self._path = Path(path)
        self._metadata = None if metadata is None else self._path / metadata
        self._given_classes = classes

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return list(self._given_classes)
        found = {row["label"] for row in self._rows if isinstance(row["label"], str)}
        return sorted(found)

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        if not self._path.is_dir():
            raise MissingFile(f"no folder {self._path}; set source.path to the folder with the images")
        rows = self._scan() if self._metadata is None else self._read_table(self._metadata)
        if not rows:
            raise MissingFile(
                f"no images under {self._path}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        return rows

    def _scan(self) -> list[dict[str, Any]]:
        rows = []
        top = {p.name for p in self._path.iterdir() if p.is_dir()}
        has_splits = "train" in top and top <= {"train", "val", "valid", "validation", "test"}
        for file in sorted(self._path.rglob("*")):
            if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
                continue
            parts = file.relative_to(self._path).parts
            folders = parts[1:-1] if has_splits else parts[:-1]
            rows.append(
                {
                    "path": "/".join(parts),
                    "label": folders[0] if folders else None,
                    "caption": None,
                    "split": parts[0] if has_splits else None,
                }
            )
        return rows

    def _read_table(self, path: Path) -> list[dict[str, Any]]:
        if not path.is_file():
            raise MissingFile(f"no table {path}; source.metadata is relative to source.path")
        with path.open(newline="") as file:
            lines: list[dict[str, Any]] = (
                [json.loads(line) for line in file if line.strip()]
                if path.suffix == ".jsonl"
                else list(csv.DictReader(file))
            )
        if any(not line.get("path") for line in lines):
            raise InputError(f"{path} has rows without path; each row needs the file's path below {self._path}")
        rows = [{k: line.get(k) or None for k in ("path", "caption", "split")} for line in lines]
        for row, line in zip(rows, lines, strict=True):
            label = line.get("label")
            row["label"] = None if label in (None, "") else as_int(label)
        return rows

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return self._rows[index]["path"]

    def split(self, index: int) -> str | None:
        """From the top folder or the table."""
        return self._rows[index]["split"]

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return Record(
            image=(self._path / row["path"]).read_bytes(),
            name=row["path"],
            label=class_number(row["label"], self._numbers, self._path),
            caption=row["caption"],
            split=row["split"],
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}


def leading_split(path: Path) -> str | None:
    """The split a file name begins with: ``train``, ``val`` (also ``validation``), ``test``, or None."""
    return next((word for word in ("train", "val", "test") if path.name.lower().startswith(word)), None)


def as_int(label: Any) -> int | str:
    """Labels of text files: a number where it is one."""
    return int(label) if str(label).lstrip("-").isdigit() else str(label)


def class_number(label: Any, numbers: Mapping[str, int], where: object) -> int | None:
    """Label as a number; names are looked up in ``numbers``."""
    if not isinstance(label, str):
        return None if label is None else int(label)
    if label not in numbers:
        raise InputError(f"class {label!r} in {where} is not among source.classes ({len(numbers)} names)")
    return numbers[label]
