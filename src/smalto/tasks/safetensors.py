"""The safetensors format: a length, a JSON header, the bytes of all tensors.

Written here rather than taken from the package of that name, because that one gathers all bytes in memory before it
writes; here a tensor goes from file to file.
"""

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from smalto.errors import InputError, MissingFile
from smalto.files import replacing

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUFFIX = ".safetensors"
CHECKSUMS = "crc32"
"""Entry of the metadata: eight hex digits for each tensor, in the order of their bytes."""


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save at ``path`` at once: temporary name, fsync, rename.

    Raises:
        ValueError: a dtype that the format does not know.
    """
    # Wide types first, so that every tensor starts at a multiple of its element size and can be mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", CHECKSUMS: "0" * 8 * len(names)}}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise InputError(f"{name} is {tensor.dtype}, safetensors here takes {', '.join(DTYPES)}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(_head(header))
        checksums = []
        for name in names:
            data = tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data
            checksums.append(f"{crc32(data):08x}")
            file.write(data)
        header["__metadata__"][CHECKSUMS] = "".join(checksums)  # as long as it was
        file.seek(0)
        file.write(_head(header))


def _head(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors by name, mapped from the file and read when used.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path} does not exist, or is no file; check the path")
    try:
        header, first = _header(path)
        data: Any = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        return {
            name: _view(data[first + start : first + end], dtype, shape)
            for name, (start, end, dtype, shape) in _places(header, path.stat().st_size - first).items()
        }
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not a whole safetensors file ({reason}); copy it again") from error


def read_checksums(path: Path) -> set[tuple[int, int]]:
    """Size and CRC-32 of every tensor, as the file has them; empty if it has none.

    Raises:
        InputError: something else in their place.
    """
    try:
        header, first = _header(path)
        text = header.get("__metadata__", {}).get(CHECKSUMS, "")
        sizes = sorted((start, end) for start, end, *_ in _places(header, path.stat().st_size - first).values())
        if text and not re.fullmatch(rf"[0-9a-f]{{{8 * len(sizes)}}}", text):
            raise ValueError("its checksums are not those of its tensors")
    except DAMAGE as error:
        raise InputError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    return {(end - start, int(text[8 * i : 8 * i + 8], 16)) for i, (start, end) in enumerate(sizes)} if text else set()


DAMAGE = (struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON, and where the bytes of the tensors begin."""
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > size - 8:
            raise InputError(f"its header would have {length} bytes, the file has {size}")
        return json.loads(file.read(length)), 8 + length


def _places(header: dict[str, Any], size: int) -> dict[str, tuple[int, int, torch.dtype, list[int]]]:
    """First and last byte, dtype and shape of every tensor, in ``size`` bytes that none shares with another."""
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict):
                raise InputError("its metadata is no object")
            continue
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
        if not name.isprintable() or any(type(n) is not int or n < 0 for n in (start, end, *shape)):
            raise InputError(f"its entry {name[:60]!r} is not described by whole numbers")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise InputError(
                f"{name[:60]} has {end - start} bytes, its shape needs {math.prod(shape) * dtype.itemsize}"
            )
        places[name] = (start, end, dtype, shape)
    last = max((end for _, end, *_ in places.values()), default=0)
    announced = sum(end - start for start, end, *_ in places.values())
    if max(last, announced) > size:
        raise InputError(f"{max(last, announced)} bytes are announced, the file has {size}")
    return places


def _view(raw: Any, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """A tensor on a storage of its own: on a shared one, ``torch.save`` of one tensor would write all of them."""
    tensor = torch.empty(0, dtype=torch.uint8).set_(raw)
    return (tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()).view(dtype).view(shape)
