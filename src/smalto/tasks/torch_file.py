"""Files of ``torch.save``, read without running anything that they bring along and written at once."""

import argparse
import io
import os
import pickle
import re
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO, Any, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo, is_zipfile

import torch
from zlib_ng.zlib_ng import crc32

from smalto.errors import InputError, MissingFile
from smalto.files import replacing
from smalto.tasks.contents import check_plain
from smalto.tasks.pickles import check_pickle

DAMAGE = (
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    BadZipFile,
)
"""What torch raises on damaged files, depending on where they are damaged."""

KNOWN_TO_PICKLES = re.compile(
    r"collections OrderedDict|argparse Namespace|torch Size|torch\.nn\.parameter Parameter"
    r"|torch\._utils (_rebuild_tensor|_rebuild_tensor_v2|_rebuild_parameter)"
    r"|torch \w+Storage|torch (float|bfloat|complex|u?int|bool)\d*"
)
"""All that a checkpoint may name. Torch's own list is longer: it has what makes objects of any size from a number."""
PICKLES_OF_OLD_FILES = 5
"""Magic number, protocol, system, content, keys of the storages."""

THREADS = 8
"""At most, for checksums; main memory is read no faster by more."""
LOCAL_HEADER = struct.Struct("<26xHH")
"""Of a part of a zip archive: lengths of its name and of what follows that, at the end of the fixed bytes."""

NOT_TORCH = (
    (b"PK", "a truncated zip archive"),
    (b"<", "a web page or other markup: the download needs another link or a login"),
    (b"version https://git-lfs", "a git-lfs pointer: run git lfs pull where it came from"),
)
"""First bytes of files that are often taken for checkpoints."""


def read_torch_file(path: str | Path) -> Any:
    """What ``torch.save`` wrote there: tensors and plain data only, tensors mapped from the file and read when used.

    ``weights_only=True`` always, and of what that allows only :data:`KNOWN_TO_PICKLES`; ``argparse.Namespace`` is what
    the LlamaGen authors save beside their weights. Files in the format before torch 1.6 are read into memory.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder, another kind of file, damage, or objects that are not plain data.
    """
    path = Path(path)
    if path.is_dir():
        known = ("consolidated.pth", "last.ckpt", "checkpoints/last.ckpt")
        inside = next((name for name in known if (path / name).exists()), known[-1])
        raise InputError(f"{path} is a folder, a checkpoint file is needed, for instance {path}/{inside}")
    if not path.exists():
        raise MissingFile(f"checkpoint {path} does not exist; train one with smalto train, or check the path")
    if not path.is_file():  # a pipe would wait for somebody to write
        raise InputError(f"{path} is no plain file, a checkpoint is needed")
    with path.open("rb") as file:
        head = file.read(512)
    zipped = is_archive(path)
    if not zipped and not re.match(rb"\x80[\x02-\x05]", head):  # the old format is a row of pickles
        start = head.lstrip().lower()
        kind = next((what for mark, what in NOT_TORCH if start.startswith(mark.lower())), None)
        kind = kind or ("another kind of file" if head else "an empty file")
        raise InputError(f"{path} is not a torch checkpoint (not a whole zip archive, but {kind}); copy it again")
    size = path.stat().st_size
    try:
        check_archive(path, size) if zipped else _check_pickles(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about unusual pickles; they load or they do not
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        check_plain(content, size)
    except (*DAMAGE, OSError) as error:  # offsets that no file has are an error of the system
        raise InputError(f"{path} could not be read as a checkpoint: {_reason(error)}") from error
    return content


def is_archive(path: Path) -> bool:
    """As :func:`zipfile.is_zipfile`, for archives that say they are parts of one too."""
    try:
        return is_zipfile(path)
    except (BadZipFile, struct.error, ValueError, OSError):
        return False


def check_archive(source: Path | io.BytesIO, size: int, *, verify: bool = False) -> None:
    """Refuse what is packed, as a small file could then hold any amount, and pickles that name what they may not.

    Args:
        source: the archive, of ``size`` bytes.
        size: of it.
        verify: compare all of it with its checksums; of pickles they are compared in any case.

    Raises:
        ValueError: or another of :data:`DAMAGE`.
    """
    with ZipFile(source) as archive:
        entries = archive.infolist()
        if any(e.compress_type != ZIP_STORED or e.file_size != e.compress_size for e in entries):
            raise InputError("its parts are compressed, which torch.save does not do")
        if sum(e.file_size for e in entries) > size:
            raise InputError("its parts are larger than the file")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                with archive.open(entry) as file:
                    check_pickle(file, KNOWN_TO_PICKLES)
                    file.read()  # at the end the checksum is compared
    damaged = _damaged_part(source, entries) if verify else None
    if damaged:
        raise BadZipFile(f"the checksum of {damaged} differs")


def _damaged_part(source: Path | io.BytesIO, entries: list[ZipInfo]) -> str | None:
    """As :meth:`zipfile.ZipFile.testzip` of parts that are not packed, several times faster."""
    if isinstance(source, Path):
        with source.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            return _damaged_entry(content, entries)
    return _damaged_entry(source.getbuffer(), entries)


def _damaged_entry(content: mmap | memoryview, entries: list[ZipInfo]) -> str | None:
    def differs(entry: ZipInfo) -> bool:
        name, extra = LOCAL_HEADER.unpack_from(content, entry.header_offset)
        begin = entry.header_offset + LOCAL_HEADER.size + name + extra
        with memoryview(content) as whole, whole[begin : begin + entry.file_size] as part:
            return crc32(part) != entry.CRC

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return next((e.filename for e, wrong in zip(entries, pool.map(differs, entries), strict=True) if wrong), None)


def _check_pickles(path: Path) -> None:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        for _ in range(PICKLES_OF_OLD_FILES):
            check_pickle(cast("IO[bytes]", content), KNOWN_TO_PICKLES)


def _reason(error: Exception) -> str:
    """One line of torch's many."""
    if isinstance(error, InputError):
        return f"{error}; ask whoever made it for another"
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        return (
            f"it holds {found[1]}, which is code and not a tensor; loading runs no code, so ask whoever made it for "
            "a file with tensors only (torch.save of a state_dict)"
        )
    return f"{one_line(error)} (damaged, or not a file of torch.save; copy it again)"


def one_line(error: BaseException) -> str:
    """The first line of an error, without what a terminal would obey."""
    text = str(error).strip()
    return re.sub(r"[^ -~]+", " ", text.splitlines()[0] if text else type(error).__name__)[:200]


def write_torch_file(path: Path, content: Any) -> None:
    """Save at ``path`` at once: temporary name, fsync, rename. Mapped tensors go from file to file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
