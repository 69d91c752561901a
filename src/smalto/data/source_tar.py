"""Images in WebDataset shards, our own or others'."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from smalto.data.patterns import expand_paths
from smalto.data.shards import IMAGE_SUFFIXES, META, Member, read_member, split_key, tar_members
from smalto.data.sources import Record, Source, as_int, class_number, leading_split
from smalto.errors import InputError, MissingFile


class Tar(Source):
    """WebDataset shards (uncompressed tar), our own or others': members of one key are one record.

    Reads the first image of a key, ``cls`` (a number), ``txt`` (a caption), and ``json`` with ``label`` and
    ``caption``. The split is the word ``train``, ``val``, ``validation`` or ``test`` at the start of the
    shard's name, where all shards have one.

    Args:
        path: a file, a folder, or a pattern such as ``data/train-{000..099}.tar``.
        classes: names in the order of the labels; None: from the meta.json beside the shards, if there
            is one.

    Raises:
        FileNotFoundError: ``path`` matches nothing.
        ValueError: a shard is compressed or damaged.
    """

    def __init__(self, *, path: str | Path, classes: Sequence[str] | None = None) -> None:
        self._pattern = path
        self._given_classes = classes

    @cached_property
    def _entries(self) -> list[tuple[Path, str, dict[str, Member]]]:
        entries = []
        for shard in expand_paths(self._pattern):
            found: dict[str, dict[str, Member]] = {}
            for member in tar_members(shard):
                key, suffix = split_key(member.name)
                if suffix in found.setdefault(key, {}):
                    raise InputError(f"{shard} holds {member.name} twice; write it with unique keys, or leave it out")
                found[key][suffix] = member
            entries += [(shard, key, members) for key, members in found.items() if _image_suffix(members)]
        if not entries:
            raise MissingFile(f"the tar files at {self._pattern} hold no images")
        return entries

    @cached_property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Class names."""
        if self._given_classes is not None:
            return list(self._given_classes)
        meta = self._entries[0][0].parent / META
        return list(json.loads(meta.read_text()).get("classes", [])) if meta.is_file() else []

    @cached_property
    def _has_splits(self) -> bool:
        return all(leading_split(shard) for shard in {shard for shard, _, _ in self._entries})

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """Shard and key."""
        shard, key, _ = self._entries[index]
        return f"{shard.name}/{key}"

    def split(self, index: int) -> str | None:
        """From the name of the shard."""
        return leading_split(self._entries[index][0]) if self._has_splits else None

    def __getitem__(self, index: int) -> Record:
        shard, _, members = self._entries[index]
        more = json.loads(read_member(shard, members["json"])) if "json" in members else {}
        label, caption = more.get("label"), more.get("caption")
        if "cls" in members:
            label = read_member(shard, members["cls"]).decode().strip()
        if "txt" in members:
            caption = read_member(shard, members["txt"]).decode()
        numbers = {name: number for number, name in enumerate(self.classes)}
        return Record(
            image=read_member(shard, members[_image_suffix(members)]),
            name=self.name(index),
            label=class_number(None if label is None else as_int(label), numbers, shard),
            caption=caption,
            split=self.split(index),
        )


def _image_suffix(members: Mapping[str, Member]) -> str:
    return next((suffix for suffix in members if "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES), "")
