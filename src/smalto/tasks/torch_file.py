"""Files of ``torch.save``, read without running anything that they bring along and written at once."""

import argparse
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from smalto.errors import InputError, MissingFile
from smalto.files import replacing

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
    struct.error,
)
"""What torch raises on damaged files, depending on where they are damaged."""

NOT_TORCH = (
    (b"PK", "a truncated zip archive"),
    (b"<", "a web page or other markup: the download needs another link or a login"),
    (b"version https://git-lfs", "a git-lfs pointer: run git lfs pull where it came from"),
)
"""First bytes of files that are often taken for checkpoints."""


def read_torch_file(path: str | Path) -> Any:
    """What ``torch.save`` wrote there: tensors and plain data only, tensors mapped from the file and read when used.

    ``weights_only=True`` always; of classes, only ``argparse.Namespace`` is known, which the LlamaGen authors save
    beside their weights. Files in the format before torch 1.6 are read into memory.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a folder, another kind of file, damage, or objects that are not plain data.
    """
    path = Path(path)
    if path.is_dir():
        inside = "consolidated.pth" if (path / "consolidated.pth").exists() else "checkpoints/last.ckpt"
        raise InputError(f"{path} is a folder, a checkpoint file is needed, for instance {path}/{inside}")
    if not path.exists():
        raise MissingFile(f"checkpoint {path} does not exist; train one with smalto train, or check the path")
    with path.open("rb") as file:
        head = file.read(512)
    zipped = is_zipfile(path)
    if not zipped and not re.match(rb"\x80[\x02-\x05]", head):  # the old format is a row of pickles
        start = head.lstrip().lower()
        kind = next((what for mark, what in NOT_TORCH if start.startswith(mark.lower())), None)
        kind = kind or ("another kind of file" if head else "an empty file")
        raise InputError(f"{path} is not a torch checkpoint (not a whole zip archive, but {kind}); copy it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about unusual pickles; they load or they do not
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except DAMAGE as error:
        raise InputError(f"{path} could not be read as a checkpoint: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line of torch's many."""
    text = str(error)
    found = re.search(r"GLOBAL ([\w.]+)", text)
    if found:
        return (
            f"it holds {found[1]}, which is code and not a tensor; loading runs no code, so ask whoever made it for "
            "a file with tensors only (torch.save of a state_dict)"
        )
    line = re.sub(r"\s+", " ", text.strip().splitlines()[0] if text.strip() else type(error).__name__)
    return f"{line[:200]} (damaged, or not a file of torch.save; copy it again)"


def write_torch_file(path: Path, content: Any) -> None:
    """Save at ``path`` at once: temporary name, fsync, rename. Mapped tensors go from file to file."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)
