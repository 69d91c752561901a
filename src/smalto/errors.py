"""What a user can put right. It is told in one message; any other exception is a bug of ours and keeps its traceback.

Each class is also the built-in that fits, for those who call smalto as a library.
"""

import errno
import re


class UserError(Exception):
    """Something given or found that cannot be used: the message says what, the rule, and what helps."""


class InputError(UserError, ValueError):
    """A setting, or the content of a file, that breaks a rule."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class PathInUse(UserError, FileExistsError):
    """A file or folder that holds something else, or belongs to somebody else at the moment."""


class StorageError(UserError, OSError):
    """A disk or file system that refuses."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text as a terminal may have it: names from files can hold what moves its cursor, or answers for its user.

    Lines, tabs and letters of every script stay.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network file system lost a file",
    errno.EMFILE: "this process may open no more files (ulimit -n)",
    errno.ENFILE: "this machine may open no more files",
    errno.ENOMEM: "not enough memory",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "links that lead round in a circle",
    errno.ENOTDIR: "a part of the path is no folder",
    errno.EISDIR: "a folder is where a file should be",
    errno.EEXIST: "something else is in the way",
}
"""What the system means by the errors that no program can help: full disks, rights, limits, impossible paths."""
