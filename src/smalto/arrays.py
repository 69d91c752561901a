"""Arrays in files of numpy, from whoever wrote them: no objects, and no more memory than the file gives reason for."""

import math
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field end the fixed part of a zip member's header
_HEADERS: dict[tuple[int, int], Callable[[Any], tuple[tuple[int, ...], bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_GROWTH = 200
_FREE = 2**28  # unpacked bytes before proportions count


def npz_array(path: Path, key: str, *, mapped: bool = True, packed: bool = True) -> np.ndarray:
    """An array of an ``.npz`` file: mapped where it lies uncompressed, else read whole.

    Args:
        path: of the file.
        key: name of the array.
        mapped: False: read it in any case, and compare it with its checksum.
        packed: whether it may be compressed.

    Raises:
        Exception: damaged, objects, or it claims another size than it has; zipfile and numpy raise all there is.
    """
    with zipfile.ZipFile(path) as archive:
        name = f"{key}.npy" if f"{key}.npy" in archive.namelist() else key
        info = archive.getinfo(name)
        with archive.open(info) as member:
            version = np.lib.format.read_magic(member)
            if version not in _HEADERS:
                raise ValueError(f"its version of .npy is {version}")
            shape, fortran, dtype = _HEADERS[version](member)
            header = member.tell()
            if dtype.hasobject:
                raise ValueError("it holds Python objects")
            count = math.prod(shape)
            if info.file_size - header != count * dtype.itemsize:
                raise ValueError(f"it claims {count} values of {dtype} and holds {info.file_size - header} bytes")
            if info.compress_type != zipfile.ZIP_STORED and not packed:
                raise ValueError("it is compressed")
            if info.file_size > max(_FREE, _GROWTH * os.path.getsize(path)):
                raise ValueError(f"it unpacks to {info.file_size} bytes, more than {_GROWTH} times the file")
            order: Literal["F", "C"] = "F" if fortran else "C"
            if info.compress_type != zipfile.ZIP_STORED or not (count and mapped):
                return np.frombuffer(member.read(), dtype, count).reshape(shape, order=order)
    with path.open("rb") as file:
        file.seek(info.header_offset)
        start = sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size)), info.header_offset + _LOCAL_HEADER.size)
    return np.memmap(path, dtype=dtype, mode="r", shape=shape, offset=start + header, order=order)


def npy_array(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, mapped: its header may claim any size.

    Raises:
        Exception: another kind of file, damaged, or objects.
    """
    if not path.is_file():
        raise ValueError("no plain file")
    with path.open("rb") as file:
        if file.read(6) != b"\x93NUMPY":
            raise ValueError("no .npy file")
    return np.load(path, mmap_mode="r", allow_pickle=False)
