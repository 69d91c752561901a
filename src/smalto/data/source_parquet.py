"""Images in Parquet files, as public hubs serve them."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.patterns import expand_paths
from smalto.data.sources import Record, Source, class_number, leading_split
from smalto.errors import InputError


class Parquet(Source):
    """Parquet files with encoded images, as public hubs serve them.

    Args:
        path: a file, a folder, or a pattern with braces and wildcards.
        image_column: bytes of an image file, or a struct with a field ``bytes``.
        label_column: class number, or class name when ``classes`` is given or the file lists its class names;
            None: no labels.
        caption_column: a sentence; None: no captions.
        split_column: ``train``, ``val``, ``test``; None: the words ``train``, ``val``, ``validation`` or
            ``test`` at the start of the file name, where all files have one.
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
        self._given_classes = classes
        self._window = window
        self._groups: OrderedDict[int, dict[str, Any]] = OrderedDict()

    @cached_property
    def _files(self) -> list[Any]:
        import pyarrow.parquet as pq  # here, because only this source needs it

        files = [(path, pq.ParquetFile(path)) for path in expand_paths(self._pattern, ".parquet")]
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

    @cached_property
    def _splits(self) -> list[str | None]:
        if self._split is not None:
            return [s for _, file in self._files for s in file.read([self._split])[self._split].to_pylist()]
        words = [leading_split(path) for path, _ in self._files]
        if None in words:
            return [None] * len(self)
        return [w for w, (_, file) in zip(words, self._files, strict=True) for _ in range(file.metadata.num_rows)]

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return list(self._given_classes)
        if self._class_name is not None and self._label is not None:
            names: dict[int, str] = {}
            for _, file in self._files:
                table = file.read([self._label, self._class_name])
                names.update(zip(table[self._label].to_pylist(), table[self._class_name].to_pylist(), strict=True))
            return [names.get(number, str(number)) for number in range(max(names) + 1)]
        # the note that the datasets library leaves in the schema
        note = json.loads((self._files[0][1].schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        return list(note.get("info", {}).get("features", {}).get(self._label, {}).get("names", []))

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
        label = None if self._label is None else columns[self._label][row].as_py()
        return Record(
            image=image,
            name=self.name(index),
            label=class_number(label, self._numbers, self._pattern),
            caption=None if self._caption is None else columns[self._caption][row].as_py(),
            split=self.split(index),
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

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
            wanted = [c for c in (self._image, self._label, self._caption) if c is not None]
            table = self._files[file][1].read_row_group(local, columns=wanted)
            self._groups[group] = {name: table[name].combine_chunks() for name in wanted}
        return self._groups[group]
