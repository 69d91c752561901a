"""Checksums of weights, compared while the weights are read.

``torch.save`` and our safetensors keep a CRC-32 of every tensor. It is computed here by threads of its own while the
network is built and filled, which reads the same bytes. A generator of 440 MB on two busy cores: 0.74 of the time
without it from a disk, as the threads read ahead; 1.08 from the page cache (``tests/tasks/test_integrity.py``).
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from smalto.errors import InputError
from smalto.tasks.safetensors import SUFFIX, read_checksums
from smalto.tasks.torch_file import THREADS


@contextmanager
def verified(path: str | Path, tensors: Iterable[Tensor], *, verify: bool = True) -> Iterator[None]:
    """Within it tensors that are mapped from a file are compared with the checksums in it; what is made of them counts
    when it ends well. Files without checksums pass.

    Raises:
        InputError: at the end: bytes are not those that were written.
    """
    known = checksums(Path(path)) if verify else set()
    if not known:
        yield
        return
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(_checksum, (storage for storage in storages.values() if storage.nbytes()))
        yield
        wrong = sum(each not in known for each in found)
    if wrong:
        raise InputError(
            f"{path} is damaged: {wrong} of its tensors are not what was written (checksums differ); copy it again, "
            "or use another one (verify=false takes it as it is)"
        )


def checksums(path: Path) -> set[tuple[int, int]]:
    """Size and CRC-32 of every tensor, as the file has them; empty if it has none."""
    if path.is_dir():
        return set()  # each part is compared when it is read
    if path.suffix == SUFFIX:
        return read_checksums(path)
    if not is_zipfile(path):  # it has been read: it is one, or of the old format
        return set()
    with ZipFile(path) as archive:
        return {(entry.file_size, entry.CRC) for entry in archive.infolist()}


def _checksum(storage: Any) -> tuple[int, int]:
    return storage.nbytes(), crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)


def all_tensors(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a checkpoint."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from all_tensors(value)
