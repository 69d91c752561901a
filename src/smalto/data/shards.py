"""Reading what ``smalto prepare`` and ``smalto extract`` wrote: meta.json, member offsets, arrays in place.

A data set is a folder of plain tar files and a ``meta.json``. Members are found once, by walking the headers;
after that an image, or the codes of one, is a single read at an offset in the tar itself.
"""

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from smalto.data.meta import CODES, IMAGES, meta_problems, read_json
from smalto.data.tar_members import Member, tar_members
from smalto.errors import InputError, MissingFile

__all__ = ["CODES", "IMAGES", "Member", "tar_members"]

VERSION = 1
META = "meta.json"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_MAKE = {
    IMAGES: "make it with: smalto prepare source=NAME out={path}",
    CODES: "make it with: smalto extract tokenizer_ckpt=CHECKPOINT data=IMAGE_SHARDS out={path}",
}
_KIND = {IMAGES: "image shards", CODES: "code shards"}


def read_meta(path: str | Path, expected: Literal["smalto-images", "smalto-codes"]) -> dict[str, Any]:
    """The meta.json of the data set in folder ``path``, checked against what is there.

    Raises:
        FileNotFoundError: no such folder, no meta.json (unfinished or not ours), or a shard is missing.
        ValueError: the other kind of shards, another version, unreadable, or a shard of another size.
    """
    path = Path(path)
    make = _MAKE[expected].format(path=path)
    if not path.is_dir():
        raise MissingFile(f"no data at {path}; {make}")
    if not (path / META).is_file():
        unfinished = " (it was begun but not finished: run the same command again)"
        raise MissingFile(
            f"{path} has no {META}, so it holds no finished {_KIND[expected]}"
            f"{unfinished if (path / 'plan.json').exists() else ''}; {make}"
        )
    try:
        meta = read_json(path / META)
        found, version = meta["format"], meta["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / META} is not a smalto {META} ({error}); {make}") from error
    if found != expected:
        raise InputError(
            f"{path} holds {_KIND.get(str(found), str(found)[:60])}, but {_KIND[expected]} are needed here; "
            f"give another folder or {make}"
        )
    if version != VERSION:
        raise InputError(f"{path} is version {version}, this smalto reads version {VERSION}; {make}")
    problems = meta_problems(meta)
    if problems:
        raise InputError(f"{path / META} contradicts itself: {'; '.join(problems)}; {make} overwrite=true")
    missing = missing_shards(path, meta)
    if missing:
        more = f" ({len(missing) - 1} others too)" if len(missing) > 1 else ""
        raise MissingFile(f"{path / missing[0]} is listed in {META} but missing{more}; restore it, or {make}")
    for shard in _shards(meta):
        file = path / shard["name"]
        if file.stat().st_size != shard["bytes"]:
            raise InputError(
                f"{file} has {file.stat().st_size} bytes, {META} says {shard['bytes']}: "
                f"copied incompletely or changed; restore it, or {make} overwrite=true"
            )
    return meta


def missing_shards(path: str | Path, meta: dict[str, Any]) -> list[str]:
    """Names of the shards in a meta.json that are not in folder ``path``."""
    return [shard["name"] for shard in _shards(meta) if not (Path(path) / shard["name"]).is_file()]


def shard_files(path: str | Path, meta: dict[str, Any]) -> list[Path]:
    """meta.json and all shards."""
    return [Path(path) / META, *(Path(path) / shard["name"] for shard in _shards(meta))]


def _shards(meta: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return itertools.chain.from_iterable(split["shards"] for split in meta["splits"].values())


def split_key(name: str) -> tuple[str, str]:
    """Member name to what WebDataset calls key and suffix: cut at the first dot after the last slash."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (f"{folder}/{stem}" if folder else stem), suffix.lower()


def read_member(path: str | Path, member: Member) -> bytes:
    """Content of one member."""
    with Path(path).open("rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


class ShardFiles:
    """Reads at any place of several files, by number; each process opens its own.

    Not memory maps: the pages of a file that is read all over would count as memory of the process, up to the size of
    the set, and the calls cost no more than the page faults.

    Args:
        paths: of the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self._files: dict[int, int] = {}  # number to descriptor
        self._pid = os.getpid()

    def descriptor(self, number: int) -> int:
        """Of file ``number``, open in this process."""
        if self._pid != os.getpid():  # a forked worker opens its own
            self._files, self._pid = {}, os.getpid()
        if number not in self._files:
            self._files[number] = os.open(self.paths[number], os.O_RDONLY)
        return self._files[number]

    def read(self, number: int, size: int, offset: int) -> bytes:
        """``size`` bytes from ``offset`` of file ``number``; fewer only where the file ends."""
        return os.pread(self.descriptor(number), size, offset)

    def __del__(self) -> None:
        if self._pid == os.getpid():
            for descriptor in self._files.values():
                os.close(descriptor)


def map_member(path: str | Path, member: Member) -> np.memmap:
    """An ``.npy`` member as a read-only memory map into the tar; nothing is read yet.

    The map's ``offset`` attribute is the place of element 0 in the file.

    Raises:
        ValueError: not a C-contiguous ``.npy`` of plain numbers.
    """
    with Path(path).open("rb") as file:
        file.seek(member.offset)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = read(file)
        except Exception as error:  # a damaged header fails in ways that are nobody's list
            raise InputError(f"{member.name} in {path} is no .npy array, or damaged: {error}") from error
        if fortran_order or dtype.hasobject:
            raise InputError(f"{member.name} in {path} is not a plain C-ordered array")
        if file.tell() + math.prod(shape) * dtype.itemsize > member.offset + member.size or min(shape, default=0) < 0:
            raise InputError(f"{member.name} in {path} states a shape of {shape}, which is more than the file holds")
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)
