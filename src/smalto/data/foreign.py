"""Bytes from outside in the hands of libraries, which raise all there is when they are damaged."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from smalto.errors import InputError, UserError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Make one line of whatever goes wrong while ``what`` is read; our own messages stay.

    Raises:
        ValueError: it went wrong.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An exception in one line, also where it has no text or many lines."""
    return one_line(str(error)) or type(error).__name__


def one_line(text: str) -> str:
    """A name from outside for a message, which has one line."""
    return " ".join(text.split())


def open_plain(path: Path) -> BinaryIO:
    """A file for reading; one that is no plain file (a folder, or a pipe, at which we would wait) is refused.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no plain file.
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise InputError(f"{path} is no plain file")
    return open(number, "rb")
