"""The images that an evaluation measures, kept: PNG in a folder per setting, and each folder packed as ``.npz``."""

import json
import re
from pathlib import Path
from typing import Any

from smalto.errors import PathInUse
from smalto.files import TEMPORARY, write_json
from smalto.sampling.writer import PictureFolder, pack_npz

NOTE = "evaluation.json"
"""Whose images they are: ``key`` of the evaluation, ``folders``, and ``finished`` once all are packed."""
_OURS = re.compile(r"\d{6,}\.png")


class SavedPictures:
    """Folder ``path`` of the evaluation ``key``.

    Args:
        path: the folder.
        key: of everything that decides the images.
        first: whether this process keeps the note; the others only add images.
    """

    def __init__(self, path: Path, key: str, *, first: bool) -> None:
        self.path = path
        self._key, self._first = key, first
        self._counts: dict[str, int] = {}

    def is_finished(self) -> bool:
        """Whether all images of this evaluation are here and packed."""
        note = self._read()
        packed = all(self._pack_file(name).is_file() for name in note["folders"])
        return note["key"] == self._key and note["finished"] and packed

    def claim(self, *, overwrite: bool) -> bool:
        """Make sure that no other images are here.

        Returns:
            Whether what this very evaluation left when it was interrupted is here, to go on with.

        Raises:
            FileExistsError: something else is here. With ``overwrite`` the images of the evaluation that ended here
                are removed, and nothing but them.
        """
        note = self._read()
        if note["key"] == self._key and not note["finished"]:
            return True
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            if not overwrite:
                raise PathInUse(f"save={self.path} is in use; give a new folder, or overwrite=true to write into it")
            if not self.path.is_dir():
                raise PathInUse(f"save={self.path} is a file; give a folder")
            self._clear(note["folders"])
        self._write(finished=False)
        return False

    def folder(self, name: str, count: int) -> PictureFolder:
        """For images 0 to ``count - 1`` of one setting."""
        self._counts[name] = count
        if self._first:
            self._write(finished=False)
        return PictureFolder(self.path / name)

    def finish(self) -> None:
        """Pack exactly the images that were drawn."""
        for name, count in self._counts.items():
            pack_npz(PictureFolder(self.path / name), count, self._pack_file(name))
        self._write(finished=True)

    def _pack_file(self, name: str) -> Path:
        return self.path / f"{name}.npz"  # not with_suffix: a name may hold a point, cfg_scale1.5

    def _clear(self, folders: list[str]) -> None:
        for name in folders:
            self._pack_file(name).unlink(missing_ok=True)
            folder = self.path / name
            if not folder.is_dir() or folder.is_symlink():
                continue
            for file in folder.iterdir():
                if _OURS.fullmatch(file.name) or TEMPORARY.fullmatch(file.name):
                    file.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()

    def _read(self) -> dict[str, Any]:
        """The note; one that is missing or damaged says that nothing is ours."""
        try:
            found = json.loads((self.path / NOTE).read_text())
            names = [name for name in found["folders"] if re.fullmatch(r"[\w.+-]*\w", name)]  # nothing but a name
            return {"key": found["key"], "folders": names, "finished": found["finished"] is True}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {"key": None, "folders": [], "finished": False}

    def _write(self, *, finished: bool) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        folders = sorted({*self._counts, *([] if finished else self._read()["folders"])})
        write_json(self.path / NOTE, {"key": self._key, "folders": folders, "finished": finished})
