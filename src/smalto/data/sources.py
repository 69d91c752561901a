"""Where images come from: the interface of all sources, and image files in folders.

A source lists its records cheaply and reads one by number; it decides nothing else. All sources are random
access, so ``smalto prepare`` can mix them.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from smalto.data.annotations import (
    MAX_LABEL,
    check_labels,
    class_number,
    class_numbers,
    class_order,
    given_names,
    split_word,
)
from smalto.data.folder_scan import Found, compare_classes, find_pictures, folders_are_splits
from smalto.data.pictures import read_picture_file
from smalto.data.tables import Row, read_rows
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

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

    @property
    def skipped(self) -> Mapping[str, int]:
        """What was found and is no record, counted by kind."""
        return {}

    def check(self, records: Sequence[int] | np.ndarray | None = None) -> None:
        """Look at what is said of some records, before any image is read.

        Args:
            records: their numbers; None: all.

        Raises:
            ValueError: labels that no set of classes can have, or only for some.
        """
        return

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
        parts = self.load()
        for name, _, images, labels in parts:
            if 0 in images.shape[1:]:
                raise InputError(f"{name} has images of {images.shape[1]}x{images.shape[2]} pixels")
            outside = np.flatnonzero((labels < 0) | (labels >= (len(self.classes) or MAX_LABEL)))
            if outside.size:
                raise InputError(
                    f"{name}/{outside[0]:06d} has the label {labels[outside[0]]}; labels count from 0, and there are "
                    f"{len(self.classes)} classes: correct the file, or source.classes"
                )
        return parts

    def check(self, records: Sequence[int] | np.ndarray | None = None) -> None:
        """See the base class."""
        assert self._parts is not None

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

    Links are followed, also out of the folder: whoever places links there could place files. What a table says is
    text that came with the images, so its paths must lead to files below ``path`` without ``..``. Hidden and system
    names (``.cache``, ``__MACOSX``, ``@eaDir``, ...) and files of other kinds are left out and counted.

    Args:
        path: the folder.
        metadata: table beside the images with a column ``path`` or ``file_name`` (relative to ``path``) and any of
            ``label``, ``caption``, ``split``: ``.jsonl`` (one object a line) or ``.csv`` (with a header; columns
            separated by commas, semicolons or tabs). A column of labels is one of numbers, or of names, which are
            numbered in sorted order. None takes the class from the subfolder; files directly in ``path`` then have no
            label.
        classes: names in the order of the labels; None for those found, sorted, as numbers where all are numbers.
        layout: without a table, what the folders directly in ``path`` are: ``classes``; ``splits``, that is ``train``,
            ``val`` or ``test``, or other usual words for them, in any case; or ``auto``: splits if one of them is
            for training, and then a folder beside them that is none is refused.

    Raises:
        FileNotFoundError: no folder, no table, no images.
        ValueError: a class outside ``classes``, folders that may be both splits and classes, or a damaged table.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        metadata: str | Path | None = None,
        classes: Sequence[str] | None = None,
        layout: Literal["auto", "classes", "splits"] = "auto",
    ) -> None:
        if layout not in ("auto", "classes", "splits"):
            raise InputError(f"layout is {layout!r}; it must be auto, classes or splits")
        if layout != "auto" and metadata is not None:
            raise InputError(f"layout={layout} says what folders are, but with metadata the table does: leave one out")
        self._path = Path(path)
        self._metadata = None if metadata is None else self._path / metadata
        self._given_classes = None if classes is None else given_names(classes)
        self._layout = layout

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return self._given_classes
        return class_order(row.label for row in self._rows if isinstance(row.label, str))

    @cached_property
    def _found(self) -> Found:
        return find_pictures(self._path)

    @cached_property
    def _rows(self) -> list[Row]:
        if self._metadata is None:
            return self._from_folders()
        if not self._path.is_dir():
            raise MissingFile(f"no folder {self._path}; set source.path to the folder with the images")
        rows, more = read_rows(self._metadata)
        if not rows:
            raise MissingFile(f"{self._metadata} has no rows; it must name the images below {self._path}")
        if more:
            log.warning("%s: %d images have several captions; the first of each is taken", self._metadata, more)
        return rows

    def _from_folders(self) -> list[Row]:
        splits = folders_are_splits(self._path, self._found.files, self._layout)
        rows = []
        for parts in self._found.files:
            folders = parts[1:-1] if splits else parts[:-1]
            rows.append(Row("/".join(parts), folders[0] if folders else None, None, parts[0] if splits else None, 0))
        if splits:
            classes: dict[str, set[str]] = {}
            for row in rows:
                if isinstance(row.label, str):
                    classes.setdefault(split_word(row.split) or "", set()).add(row.label)
            compare_classes(self._path, classes)
        empty = self._found.empty(2 if splits else 1)
        if empty:
            log.warning("%s: folders without images: %s", self._path, ", ".join(empty))
        return rows

    def check(self, records: Sequence[int] | np.ndarray | None = None) -> None:
        """See the base class."""
        wanted = range(len(self)) if records is None else records
        check_labels([row.label for row in self._rows], wanted, self.classes, self._place)

    def _place(self, index: int) -> str:
        row = self._rows[index]
        return row.path if self._metadata is None else f"{self._metadata}, line {row.line} ({row.path})"

    @property
    def skipped(self) -> Mapping[str, int]:
        """What lies in the folder and is no record, by kind; with a table nothing is looked for."""
        return self._found.skipped if self._metadata is None else {}

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Path below the folder."""
        return self._rows[index].path

    def split(self, index: int) -> str | None:
        """From the top folder or the table."""
        return self._rows[index].split

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        return Record(
            image=read_picture_file(self._path / row.path),
            name=row.path,
            label=class_number(row.label, self._numbers, self._path),
            caption=row.caption,
            split=row.split,
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return class_numbers(self.classes)
