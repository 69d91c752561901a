"""The safetensors format: a length, a JSON header, the bytes of all tensors.

Written here rather than taken from the package of that name, because that one gathers all bytes in memory before it
writes; here a tensor goes from file to file.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save at ``path`` at once: temporary name, fsync, rename.

    Raises:
        ValueError: a dtype that the format does not know.
    """
    # Wide types first, so that every tensor starts at a multiple of its element size and can be mapped.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
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
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in names:
            if tensors[name].numel():
                file.write(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors by name, mapped from the file and read when used.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: not such a file, or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"{path} does not exist, or is no file; check the path")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise InputError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: (*e["data_offsets"], DTYPES[e["dtype"]], e["shape"]) for name, e in header.items()}
        last = max((end for _, end, *_ in places.values()), default=0)
        if 8 + length + last > size:
            raise InputError(f"{8 + length + last} bytes are announced, the file has {size}")
        data: Any = torch.UntypedStorage.from_file(str(path), False, size)
        first = 8 + length
        return {name: _view(data[first + start : first + end], *kind) for name, (start, end, *kind) in places.items()}
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is not a whole safetensors file ({reason}); copy it again") from error


def _view(raw: Any, dtype: torch.dtype, shape: list[int]) -> Tensor:
    """A tensor on a storage of its own: on a shared one, ``torch.save`` of one tensor would write all of them."""
    tensor = torch.empty(0, dtype=torch.uint8).set_(raw)
    return (tensor if tensor.data_ptr() % dtype.itemsize == 0 else tensor.clone()).view(dtype).view(shape)
