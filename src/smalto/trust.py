"""Whose files are obeyed: a run folder is code, what its config says is built."""

import os
import stat
import tempfile
from pathlib import Path

from smalto.errors import PathInUse


def check_own(folder: Path, *names: str) -> None:
    """Refuse a folder, and files in it, that somebody else has or could have written.

    Raises:
        PathInUse: they belong to another user (also if this one is root), or everybody may write them.
    """
    for path in (folder, *(folder / name for name in names)):
        try:
            known = path.stat()
        except FileNotFoundError:
            continue
        found = None
        if known.st_uid not in (os.getuid(), 0) and known.st_uid != _owner_of_new_files(folder):
            found = f"belongs to another user (number {known.st_uid})"
        elif known.st_mode & stat.S_IWOTH:
            found = "can be written by everybody"
        if found:
            raise PathInUse(
                f"{path} {found}: a run folder is code, what it says is run as you; if you trust its content, make it "
                "yours (chown, chmod o-w) or copy it"
            )


def _owner_of_new_files(folder: Path) -> int | None:
    """Whose a file is that this process makes there: some file systems say another number (NFS that takes root for
    nobody, user namespaces, mounts with one owner), and what has it is as much this user's as anything there.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno()).st_uid
    except OSError:
        return None
