"""What an output folder holds by its plan: whose it is, which files are its own, and how they go."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from smalto.data.shards import CODES, IMAGES, META, VERSION
from smalto.data.text_blocks import LENGTH, TEXT
from smalto.errors import PathInUse
from smalto.files import TEMPORARY, write_json

SAMPLES: Final = "smalto-samples"
PLAN, DONE, LOCK, REJECTED, PARTS, PICTURES = "plan.json", "done.jsonl", ".lock", "rejected.jsonl", "parts", "images"

_SPLIT = r"(?:train|val)"
SHARD = re.compile(_SPLIT + r"-(?:\d{5}|[1-9]\d{5,})\.tar")
"""Names of shards that we write."""
_KINDS = "|".join(map(re.escape, ("npy", TEXT, LENGTH)))
_RESULTS = {
    IMAGES: SHARD,
    CODES: re.compile(rf"{SHARD.pattern}|{PARTS}/{_SPLIT}-(?:\d{{6}}|[1-9]\d{{6,}})\.(?:{_KINDS})"),
    SAMPLES: re.compile(rf"samples\.npz|{PICTURES}/(\d{{6}}|[1-9]\d{{6,}})\.png"),
}
_ROOMS = {CODES: PARTS, SAMPLES: PICTURES}
_OLD_TEMPORARY = ".tmp"  # of the first versions: NAME.tmp, or the last suffix replaced


@dataclass(frozen=True)
class Plan:
    """What a job makes in a folder, so that no other job continues it.

    Args:
        format: ``smalto-images``, ``smalto-codes`` or ``smalto-samples``.
        settings: everything that decides the content.
        listing: what the job reads, short enough to compare; None: nothing that could change.
        clearing: its results are being removed. Written first, so that whoever comes after a kill goes on removing
            and never takes what is left for finished.
    """

    format: str
    settings: dict[str, Any]
    listing: dict[str, Any] | None = None
    clearing: bool = False

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The plan in ``folder``, if there is one.

        Raises:
            FileExistsError: the file is not ours, or of a version that this one does not know.
        """
        path = folder / PLAN
        if not os.path.lexists(path):
            return None
        try:
            found = json.loads(path.read_bytes() if path.is_file() else b"")
            version = found.get("version", 1)  # the first ones did not say
            plan = cls(**{key: found[key] for key in cls.__dataclass_fields__ if key in found})
            ours = plan._is_sound()
        except (ValueError, TypeError, AttributeError, RecursionError):
            ours = False
        if not ours:
            raise PathInUse(
                f"{path} was not written by smalto, so nothing in {folder} is touched; choose another folder as out="
            )
        if version != VERSION:
            raise PathInUse(f"{path} is of version {version}, this smalto knows version {VERSION}; choose another out=")
        return plan

    def _is_sound(self) -> bool:
        return (
            self.format in _RESULTS
            and isinstance(self.settings, dict)
            and isinstance(self.listing, dict | None)
            and isinstance(self.clearing, bool)
            and (self.format != SAMPLES or type(self.settings.get("num_images")) is int)
        )

    def write(self, folder: Path) -> None:
        """Put it into ``folder``, in the place of the one before."""
        content = {key: value for key, value in asdict(self).items() if value not in (None, False)}
        write_json(folder / PLAN, {"version": VERSION, **content})

    def check_place(self, folder: Path) -> None:
        """No link is where we read a plan or make a folder: it would lead out of ``folder``.

        Raises:
            FileExistsError: there is one.
        """
        room = _ROOMS.get(self.format)
        for name in (PLAN, DONE, *([room] if room else [])):
            path = folder / name
            if path.is_symlink() or (name == room and path.exists() and not path.is_dir()):
                raise PathInUse(
                    f"{path} is {'a link' if path.is_symlink() else 'a file'}, but this job writes there itself; "
                    "remove it or choose another out="
                )

    def results(self, folder: Path) -> list[Path]:
        """What the job has made so far."""
        return [folder / name for name in self._files(folder) if self._is_result(name)]

    def unfinished(self, folder: Path) -> list[Path]:
        """Files that a killed process was writing."""
        return [folder / name for name in self._files(folder) if self._is_temporary(name)]

    def clear(self, folder: Path) -> None:
        """Remove what the job made and noted, nothing else; the plan itself stays, until another takes its place.

        Wherever this is interrupted, the plan says that the folder is being cleared.
        """
        if not self.clearing:
            Plan(self.format, self.settings, self.listing, clearing=True).write(folder)
        (folder / META).unlink(missing_ok=True)  # what is half removed must not look finished
        for path in (*self.results(folder), *self.unfinished(folder)):
            path.unlink(missing_ok=True)
        self.leave_room(folder)
        for name in self._beside():
            (folder / name).unlink(missing_ok=True)

    def leave_room(self, folder: Path) -> None:
        """Remove the folder inside, unless it holds files that are not ours."""
        room = _ROOMS.get(self.format)
        if room and (folder / room).is_dir() and not any((folder / room).iterdir()):
            (folder / room).rmdir()

    def _beside(self) -> tuple[str, ...]:
        """What lies beside the results."""
        return (META, DONE, REJECTED, *(["sheet.png"] if "num_images" in self.settings else []))

    def _files(self, folder: Path) -> Iterator[str]:
        """Files and links, here and in the folder inside, by their path from ``folder``; no link is followed."""
        room = _ROOMS.get(self.format)
        for inside in ("", *([f"{room}/"] if room else [])):
            place = folder / inside
            if not place.is_dir() or (inside and place.is_symlink()):
                continue
            with os.scandir(place) as entries:
                yield from [inside + entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]

    def _is_result(self, name: str) -> bool:
        found = _RESULTS[self.format].fullmatch(name)
        if found and self.format == SAMPLES and found[1] is not None:
            return int(found[1]) < self.settings["num_images"]
        return found is not None

    def _is_temporary(self, name: str) -> bool:
        return any(self._is_result(of) or of in (PLAN, *self._beside()) for of in written_under(name))


def written_under(temporary: str) -> list[str]:
    """Names of the file that was being written as ``temporary``, if it was one of ours: one of these."""
    if TEMPORARY.fullmatch(temporary):
        return [temporary.rsplit(".", 2)[0]]
    if temporary.endswith(_OLD_TEMPORARY):
        stem = temporary.removesuffix(_OLD_TEMPORARY)
        return [stem, stem + ".png", stem + ".npz"]
    return []


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """``key: OLD there, NEW now`` of every setting that differs; one file or folder may be written in several ways."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = {**old, **new}
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    same = old == new or (isinstance(old, str) and isinstance(new, str) and _is_one_path(old, new))
    return [] if same else [f"{prefix[:-1]}: {old} there, {new} now"]


def _is_one_path(old: str, new: str) -> bool:
    try:
        return os.path.samefile(old, new)
    except (OSError, ValueError):  # one of them is no path
        return False
