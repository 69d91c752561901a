"""Whose files are obeyed: a run folder is code, what its config says is built."""

import os
import stat
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
        if known.st_uid not in (os.getuid(), 0):
            found = f"belongs to another user (number {known.st_uid})"
        elif known.st_mode & stat.S_IWOTH:
            found = "can be written by everybody"
        if found:
            raise PathInUse(
                f"{path} {found}: a run folder is code, what it says is run as you; if you trust its content, make it "
                "yours (chown, chmod o-w) or copy it"
            )
