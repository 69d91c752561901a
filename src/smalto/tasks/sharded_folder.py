"""Checkpoints as folders: every process writes its shards, any number of processes reads them.

A folder holds the same tree that a checkpoint file would hold. Its large tensors lie in the files of
``torch.distributed.checkpoint``; the rest is ``meta.pt``, where each of them has left a mark.
"""

import io
import math
import os
import pickle
import pickletools
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.tensor import DTensor
from torch.futures import Future

from smalto.errors import InputError
from smalto.files import write_bytes
from smalto.tasks.torch_file import DAMAGE, check_archive, one_line, read_torch_file

Place = tuple[Any, ...]
"""Keys and indices that lead to a tensor in the tree."""

META, INDEX, INDEX_CHECKSUM = "meta.pt", ".metadata", ".metadata.crc32"
MARK = "smalto_tensor"
SMALL = 1024
"""Plain tensors of up to so many numbers stay in ``meta.pt``: step counters of an optimizer, for instance."""

KNOWN_TO_INDEX = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""All that an index may name; torch reads it by plain pickle, which would run whatever else it names."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in KNOWN_TO_INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of tensors needs")
        return super().find_class(module, name)


class ShardWriter(FileSystemWriter):
    """Writes an index that says nothing of the machine it was written on."""

    def storage_meta(self) -> StorageMeta:
        """Neither path nor identity."""
        return StorageMeta()

    def finish(self, metadata: Metadata, results: Any) -> None:
        """Write the index, and its checksum; the parts have theirs inside."""
        super().finish(metadata, results)
        folder = Path(self.path)
        write_bytes(folder / INDEX_CHECKSUM, f"{zlib.crc32((folder / INDEX).read_bytes()):08x}\n".encode())


class _Reader(FileSystemReader):
    """Reads an index without running what it brings along, and parts that are what was written."""

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        super().__init__(path)
        self.verify = verify

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content, checksum = (Path(self.path) / INDEX).read_bytes(), Path(self.path) / INDEX_CHECKSUM
        if self.verify and checksum.exists() and checksum.read_text().strip() != f"{zlib.crc32(content):08x}":
            raise ValueError(f"the checksum of {INDEX} differs")
        for operation, argument, _ in pickletools.genops(content):
            # Both make Python's reader take as much memory as they say.
            if operation.name == "BYTEARRAY8" or ("PUT" in operation.name and int(argument or 0) > len(content)):
                raise ValueError(f"it holds {operation.name}, as no index does")
        metadata: Metadata = _Unpickler(io.BytesIO(content)).load()
        check_index(metadata)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        parts = {(info.relative_path, info.offset): info for info in map(self._info, plan.items)}
        for (name, offset), info in sorted(parts.items()):
            with (Path(self.path) / name).open("rb") as file:
                file.seek(offset)
                try:
                    check_archive(io.BytesIO(file.read(info.length)), info.length, verify=self.verify)
                except (*DAMAGE, OSError) as error:
                    raise ValueError(f"{name}: {error}") from error
        return super().read_data(plan, planner)

    def _info(self, item: Any) -> Any:
        return self.storage_data[item.storage_index]


def check_index(metadata: Any) -> None:
    """Refuse an index that is no index, leads out of its folder, or announces more than it has parts for.

    Raises:
        ValueError: or another of :data:`DAMAGE`.
    """
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it is no index of tensors")
    names = {info.relative_path for info in metadata.storage_data.values()}
    if any(type(name) is not str or name != os.path.basename(name) for name in names):
        raise ValueError("it names files outside of the folder")
    if any(type(n) is not int or n < 0 for info in metadata.storage_data.values() for n in (info.offset, info.length)):
        raise ValueError("it holds lengths that are no numbers")
    announced = 0
    for name, entry in metadata.state_dict_metadata.items():
        if type(name) is not str or not isinstance(entry, TensorStorageMetadata):
            raise ValueError("it holds something else than tensors by name")
        announced += math.prod(entry.size) * entry.properties.dtype.itemsize
    whole = sum(_ends(metadata).values())
    if announced > whole:
        raise ValueError(f"its tensors would take {announced:,} bytes, its parts have {whole:,}")


def _ends(metadata: Metadata) -> dict[str, int]:
    """How long each file must be."""
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    return ends


def is_folder(path: str | Path) -> bool:
    """Whether a checkpoint folder, whole or not, is there."""
    return (Path(path) / META).exists() or (Path(path) / INDEX).exists()


def damage(path: Path) -> str | None:
    """What a folder lacks; None if all its parts are there in their full length."""
    missing = [name for name in (META, INDEX) if not (path / name).is_file()]
    if missing:
        return f"{' and '.join(missing)} missing"
    try:
        metadata = _Reader(path).read_metadata()
    except (*DAMAGE, OSError) as error:
        return f"{INDEX} cannot be read ({one_line(error)})"
    short = [
        name
        for name, end in _ends(metadata).items()
        if not (path / name).is_file() or (path / name).stat().st_size < end
    ]
    return f"{', '.join(sorted(short))} missing or cut short" if short else None


def take_tensors(tree: Any, place: Place = ()) -> tuple[Any, dict[str, Tensor]]:
    """The tree with marks instead of its large tensors, and those by the name in their mark; nothing is copied."""
    if isinstance(tree, Tensor) and (isinstance(tree, DTensor) or tree.numel() > SMALL):
        name = "/".join(str(key) for key in place)
        return {MARK: name}, {name: tree.detach()}
    if isinstance(tree, dict):
        pairs = {key: take_tensors(value, (*place, key)) for key, value in tree.items()}
        return {k: v for k, (v, _) in pairs.items()}, {n: t for _, found in pairs.values() for n, t in found.items()}
    if isinstance(tree, (list, tuple)):
        parts = [take_tensors(value, (*place, i)) for i, value in enumerate(tree)]
        return type(tree)(v for v, _ in parts), {n: t for _, found in parts for n, t in found.items()}
    return tree, {}


def write_meta(path: Path, tree: Any) -> None:
    """``meta.pt`` of a folder, on the disk when this returns."""
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    write_bytes(path / META, buffer.getvalue())


def read_folder(
    path: str | Path,
    *,
    like: Callable[[Place], Tensor | None] = lambda place: None,
    wanted: Callable[[Place], bool] = lambda place: True,
    verify: bool = True,
) -> Any:
    """The tree, as from a file of ``torch.save``; every process reads what it needs, without asking the others.

    Args:
        path: of the folder.
        like: sharded tensor after whose fashion the one at a place is to be divided; None: read it whole.
        wanted: which tensors to read; others come back on the meta device, with their shape only.
        verify: compare what is read with the checksums of what was written.

    Raises:
        ValueError: parts are missing or damaged.
    """
    path = Path(path)
    found = damage(path)
    if found is not None:
        raise InputError(f"{path} is not a whole checkpoint folder: {found}; copy it again, or use the one before")
    tree = read_torch_file(path / META)
    reader = _Reader(path, verify=verify)
    try:
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
    except (*DAMAGE, OSError) as error:
        raise InputError(f"{path} is damaged ({one_line(error)}); copy it again, or use the one before") from error
    targets: dict[str, Tensor] = {}

    def target(mark: str, place: Place) -> Tensor:
        entry: TensorStorageMetadata = entries[mark]
        dtype, template = entry.properties.dtype, like(place)
        if not wanted(place):
            return torch.empty(entry.size, dtype=dtype, device="meta")
        if isinstance(template, DTensor) and template.shape == entry.size:
            targets[mark] = torch.empty_like(template, dtype=dtype)
        else:
            targets[mark] = torch.empty(entry.size, dtype=dtype)
        return targets[mark]

    try:
        tree = put_tensors(tree, target)
        if targets:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # no_dist, as asked for
                dcp.load(dict(targets), storage_reader=reader, no_dist=True)
    except (*DAMAGE, OSError, dcp.CheckpointException) as error:
        cause = next((cause for cause, _ in getattr(error, "failures", {}).values()), error)
        reason = one_line(cause)
        raise InputError(f"{path} is damaged ({reason}); copy it again, or use the one before") from error
    return tree


def put_tensors(tree: Any, target: Callable[[str, Place], Tensor], place: Place = ()) -> Any:
    """The tree with ``target(name, place)`` instead of each mark."""
    if isinstance(tree, dict):
        if tree.keys() == {MARK}:
            return target(tree[MARK], place)
        return {key: put_tensors(value, target, (*place, key)) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(put_tensors(value, target, (*place, i)) for i, value in enumerate(tree))
    return tree


def folder_bytes(path: Path) -> int:
    """Size of all files of a folder."""
    return sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file())
