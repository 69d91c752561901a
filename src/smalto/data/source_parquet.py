"""Images in Parquet files, as public hubs serve them."""

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.annotations import (
    check_labels,
    class_number,
    class_numbers,
    class_order,
    file_splits,
    given_names,
    read_caption,
    read_labels,
)
from smalto.data.foreign import open_plain, reading
from smalto.data.patterns import expand_paths
from smalto.data.sources import Record, Source
from smalto.errors import InputError

_UNNAMED = 10**5  # classes that may lack a name


class Parquet(Source):
    """Parquet files with encoded images, as public hubs serve them.

    Args:
        path: a file, a folder, or a pattern with braces and wildcards.
        image_column: bytes of an image file, or a struct with a field ``bytes``.
        label_column: class numbers, or class names, which are numbered in the order of ``classes``, or of the class
            names the file lists, or sorted; None: no labels.
        caption_column: a sentence; None: no captions.
        split_column: ``train``, ``val``, ``test``; None: the words ``train``, ``val``, ``validation`` or
            ``test`` at the start of the file name, or what else tells training from something held out: the folder
            (``train/0000.parquet``), or another word in the name.
        class_name_column: names of the classes beside their numbers; read to fill ``classes``. None: not
            read.
        classes: names in the order of the labels; None: from ``class_name_column`` or the file's own
            metadata.
        window: row groups kept in memory at a time; records are mixed inside windows of so many.

    Raises:
        FileNotFoundError: ``path`` matches nothing.
        ValueError: a column is missing.
    """

    def __init__(
        self,
        *,
        path: str | Path,
        image_column: str = "image",
        label_column: str | None = "label",
        caption_column: str | None = None,
        split_column: str | None = None,
        class_name_column: str | None = None,
        classes: Sequence[str] | None = None,
        window: int = 64,
    ) -> None:
        if window < 1:
            raise InputError(f"window is {window} row groups; it must be at least 1")
        self._pattern = path
        self._image, self._label, self._caption = image_column, label_column, caption_column
        self._split, self._class_name = split_column, class_name_column
        self._given_classes = None if classes is None else given_names(classes)
        self._window = window
        self._more_captions = 0
        self._groups: OrderedDict[int, dict[str, Any]] = OrderedDict()

    @cached_property
    def _files(self) -> list[Any]:
        import pyarrow.parquet as pq  # here, because only this source needs it

        files = []
        for path in expand_paths(self._pattern, ".parquet"):
            with reading(f"{path} is not a whole Parquet file"):
                open_plain(path).close()  # pyarrow would wait for a pipe
                files.append((path, pq.ParquetFile(path)))
        wanted = [self._image, self._label, self._caption, self._split, self._class_name]
        for path, file in files:
            missing = [c for c in wanted if c is not None and c not in file.schema_arrow.names]
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(missing)}; it has "
                    f"{', '.join(file.schema_arrow.names)}: "
                    "set source.image_column, label_column (null for none), ..."
                )
        return files

    @cached_property
    def _layout(self) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """Row groups as (file, group, first overall group of the file); first record of each, the total."""
        groups: list[tuple[int, int, int]] = []
        sizes: list[int] = []
        for number, (_, file) in enumerate(self._files):
            first = len(groups)
            for group in range(file.num_row_groups):
                groups.append((number, group, first))
                sizes.append(file.metadata.row_group(group).num_rows)
        return groups, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def _column(self, name: str) -> list[Any]:
        """A whole column, of all files."""
        values = []
        for path, file in self._files:
            with reading(f"{path}: column {name} cannot be read"):
                values += file.read([name])[name].to_pylist()
        if len(values) != len(self):
            raise InputError(f"{self._pattern}: column {name} has {len(values)} values, there are {len(self)} rows")
        return values

    @cached_property
    def _splits(self) -> list[str | None]:
        if self._split is not None:
            return self._column(self._split)
        words = file_splits([path for path, _ in self._files])
        return [w for w, (_, file) in zip(words, self._files, strict=True) for _ in range(file.metadata.num_rows)]

    @cached_property
    def _labels(self) -> list[int | str | None]:
        if self._label is None:
            return [None] * len(self)
        return read_labels(self._column(self._label), self.name)

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return self._given_classes
        if self._class_name is not None and self._label is not None:
            return self._named_by_column(self._class_name)
        # the note that the datasets library leaves in the schema
        try:
            note = json.loads((self._files[0][1].schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            names = note.get("info", {}).get("features", {}).get(self._label, {}).get("names", [])
            listed = [str(name) for name in names or []]
        except (ValueError, AttributeError, TypeError, RecursionError):
            listed = []  # a note of somebody else
        return listed or class_order(label for label in self._labels if isinstance(label, str))

    def _named_by_column(self, column: str) -> list[str]:
        names: dict[int, str] = {}
        for index, (number, name) in enumerate(zip(self._labels, self._column(column), strict=True)):
            if number is None or name is None:
                continue
            if isinstance(number, str):
                raise InputError(
                    f"source.class_name_column={column} names the classes of numbers, {self._label} holds names: leave "
                    "it out"
                )
            if names.setdefault(number, str(name)) != str(name):
                raise InputError(
                    f"{self.name(index)}: class {number} is {name!r} here and {names[number]!r} before; "
                    f"source.class_name_column={column} must give each class one name"
                )
        highest = max(names, default=-1)
        if highest >= len(names) + _UNNAMED:
            raise InputError(
                f"source.class_name_column={column} names {len(names)} classes, the highest label is {highest}: labels "
                "that are no numbers from 0 on; leave it out, or correct source.label_column"
            )
        return [names.get(number, str(number)) for number in range(highest + 1)]

    def check(self, records: Sequence[int] | np.ndarray | None = None) -> None:
        """See the base class."""
        check_labels(self._labels, range(len(self)) if records is None else records, self.classes, self.name)

    @property
    def skipped(self) -> Mapping[str, int]:
        """Captions that were left out."""
        return {"captions after the first of an image": self._more_captions} if self._more_captions else {}

    def __len__(self) -> int:
        return int(self._layout[1][-1])

    def name(self, index: int) -> str:
        """File name and row."""
        file, row = self._locate(index)[2:]
        return f"{self._files[file][0].name}/{row:08d}"

    def split(self, index: int) -> str | None:
        """From the column or the file name."""
        return self._splits[index]

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """Row groups in random order, records mixed inside windows of ``window`` row groups."""
        starts = self._layout[1]
        groups = rng.permutation(len(starts) - 1)
        windows = [groups[i : i + self._window] for i in range(0, len(groups), self._window)]
        return np.concatenate(
            [rng.permutation(np.concatenate([np.arange(starts[g], starts[g + 1]) for g in w])) for w in windows]
        )

    def __getitem__(self, index: int) -> Record:
        group, row = self._locate(index)[:2]
        columns = self._load(group)
        image = columns[self._image][row].as_py()
        if isinstance(image, dict):
            image = image.get("bytes")
        if not isinstance(image, bytes):
            raise InputError(f"column {self._image} holds no image bytes in this row")
        caption, more = None, 0
        if self._caption is not None:
            caption, more = read_caption(columns[self._caption][row].as_py(), lambda: self.name(index))
        self._more_captions += more
        return Record(
            image=image,
            name=self.name(index),
            label=class_number(self._labels[index], self._numbers, self._pattern),
            caption=caption,
            split=self.split(index),
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return class_numbers(self.classes)

    def _locate(self, index: int) -> tuple[int, int, int, int]:
        """Row group overall, row inside it, file, row inside the file."""
        groups, starts = self._layout
        group = int(np.searchsorted(starts, index, side="right")) - 1
        file, _, first = groups[group]
        return group, int(index - starts[group]), file, int(index - starts[first])

    def _load(self, group: int) -> dict[str, Any]:
        if group not in self._groups:
            while len(self._groups) >= self._window:
                self._groups.popitem(last=False)
            file, local, _ = self._layout[0][group]
            wanted = [c for c in (self._image, self._caption) if c is not None]
            with reading(f"row group {local} of {self._files[file][0]} cannot be read"):
                table = self._files[file][1].read_row_group(local, columns=wanted)
                self._groups[group] = {name: table[name].combine_chunks() for name in wanted}
        return self._groups[group]
