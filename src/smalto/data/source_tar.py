"""Images in WebDataset shards, our own or others'."""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

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
from smalto.data.foreign import one_line, reading
from smalto.data.patterns import expand_paths
from smalto.data.pictures import check_file_size
from smalto.data.shards import META, Member, read_member, tar_members
from smalto.data.sources import Record, Source
from smalto.data.tar_records import Roles, record_key, roles
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

_PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz)$", re.IGNORECASE)
_TEXT = 2**20  # bytes of a label, a caption or a JSON object


class _Entry(NamedTuple):
    shard: Path
    key: str
    members: dict[str, Member]
    roles: Roles


class Tar(Source):
    """WebDataset shards (uncompressed tar), our own or others': members of one key are one record.

    Reads the image of a key, ``cls`` (a number or a name), ``txt`` (a caption), and ``json`` with ``label`` and
    ``caption``. A key ends at the first dot of a name; one with several images is refused. The labels of all shards
    are numbers, or names, which are numbered in sorted order. The split is the word ``train``, ``val``,
    ``validation`` or ``test`` at the start of the shard's name; where no name begins so, its folder (``train/0.tar``)
    or another word in its name (``imagenet1k-train-0.tar``), if these tell training from something held out.

    Args:
        path: a file, a folder, or a pattern such as ``data/train-{000..099}.tar``.
        classes: names in the order of the labels; None: from the meta.json beside the shards, if there
            is one.

    Raises:
        FileNotFoundError: ``path`` matches nothing.
        ValueError: a shard is compressed or damaged, or a key has several images.
    """

    def __init__(self, *, path: str | Path, classes: Sequence[str] | None = None) -> None:
        self._pattern = path
        self._given_classes = None if classes is None else given_names(classes)
        self._skipped: Counter[str] = Counter()

    @cached_property
    def _entries(self) -> list[_Entry]:
        entries = []
        self._skipped.clear()
        for shard in expand_paths(self._pattern):
            found: dict[str, dict[str, Member]] = {}
            for member in tar_members(shard, self._skipped):
                place = record_key(member.name)
                if place is None:
                    self._skipped["hidden or system"] += 1
                    continue
                key, suffix = place
                if suffix in found.setdefault(key, {}):
                    raise InputError(
                        f"{shard} holds {one_line(member.name)} twice; write it with unique keys, or leave it out"
                    )
                found[key][suffix] = member
            for key, members in found.items():
                parts = roles(key, members, shard)
                if parts is None:
                    self._skipped["keys without an image"] += 1
                    continue
                entries.append(_Entry(shard, key, members, parts))
                self._skipped.update(f"members .{suffix}" for suffix in set(members) - set(parts))
        if not entries:
            raise MissingFile(f"the tar files at {self._pattern} hold no images")
        folder = Path(self._pattern)
        packed = sorted(p.name for p in folder.iterdir() if _PACKED.search(p.name)) if folder.is_dir() else []
        if packed:
            self._skipped["compressed tars"] += len(packed)
            log.warning("%s: compressed tars are not read, unpack them first: %s", folder, ", ".join(packed[:5]))
        return entries

    @property
    def skipped(self) -> Mapping[str, int]:
        """Members that are no record, by kind."""
        assert self._entries is not None
        return self._skipped

    @cached_property
    def _labels(self) -> tuple[list[int | str | None], dict[int, InputError]]:
        """Label of each record as all shards say, and what keeps some from being read."""
        raw: list[Any] = []
        damaged: dict[int, InputError] = {}
        for index, entry in enumerate(self._entries):
            try:
                raw.append(self._raw_label(entry))
            except InputError as error:
                raw.append(None)
                damaged[index] = error
        return read_labels(raw, self.name), damaged

    def _raw_label(self, entry: _Entry) -> Any:
        if entry.roles.label is not None:
            return self._text(entry, entry.roles.label)
        return self._notes(entry).get("label")

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return self._given_classes
        meta = self._entries[0].shard.parent / META
        if meta.is_file():
            with reading(f"{meta} is not a smalto {META}; set source.classes, or move it"):
                names = json.loads(meta.read_text()).get("classes")
                if names is not None and not isinstance(names, list):
                    raise ValueError("its classes are no list")
                listed = given_names(names or [])
            if listed:
                return listed
        return class_order(label for label in self._labels[0] if isinstance(label, str))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return class_numbers(self.classes)

    def check(self, records: Sequence[int] | np.ndarray | None = None) -> None:
        """See the base class."""
        labels, damaged = self._labels
        wanted = range(len(self)) if records is None else records
        check_labels(labels, (i for i in wanted if i not in damaged), self.classes, self.name)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Shard and key."""
        entry = self._entries[index]
        return f"{entry.shard.name}/{entry.key}"

    def split(self, index: int) -> str | None:
        """From the name or the folder of the shard."""
        return self._splits[self._entries[index].shard]

    @cached_property
    def _splits(self) -> dict[Path, str | None]:
        shards = list(dict.fromkeys(entry.shard for entry in self._entries))
        return dict(zip(shards, file_splits(shards), strict=True))

    def __getitem__(self, index: int) -> Record:
        entry = self._entries[index]
        labels, damaged = self._labels
        if index in damaged:
            raise damaged[index]
        caption = self._notes(entry).get("caption")
        if entry.roles.caption is not None:
            caption = self._text(entry, entry.roles.caption)
        caption, more = read_caption(caption, lambda: self.name(index))
        if more:
            self._skipped["captions after the first of an image"] += more
        image = entry.members[entry.roles.image]
        check_file_size(image.size)
        return Record(
            image=read_member(entry.shard, image),
            name=self.name(index),
            label=class_number(labels[index], self._numbers, entry.shard),
            caption=caption,
            split=self.split(index),
        )

    def _text(self, entry: _Entry, suffix: str) -> str:
        member = entry.members[suffix]
        if member.size > _TEXT:
            raise InputError(f"{member.name} has {member.size} bytes; a label, caption or JSON object has {_TEXT}")
        try:
            return read_member(entry.shard, member).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{member.name} is not UTF-8 text ({error})") from error

    def _notes(self, entry: _Entry) -> dict[str, Any]:
        if entry.roles.notes is None:
            return {}
        try:
            notes = json.loads(self._text(entry, entry.roles.notes))
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            raise InputError(f"{entry.key}.{entry.roles.notes} is not JSON ({error})") from error
        if not isinstance(notes, dict):
            raise InputError(f"{entry.key}.{entry.roles.notes} is no JSON object with label or caption")
        return notes
