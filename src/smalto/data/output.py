"""The folder a long job fills: one writer at a time, continued after a kill, finished once meta.json is
there.

Files beside the shards: ``plan.json`` (what is being made, so that another job cannot continue it),
``done.jsonl`` (finished shards, until the end), ``.lock`` (while a process works), ``meta.json`` (last).
"""

import errno
import json
import logging
import os
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from smalto.data.shards import META, VERSION
from smalto.errors import REASONS, PathInUse, StorageError
from smalto.files import FileLock, write_bytes, write_json

log = logging.getLogger(__name__)

PLAN, DONE, LOCK, REJECTED, PARTS = "plan.json", "done.jsonl", ".lock", "rejected.jsonl", "parts"
_OURS = re.compile(r"(train|val)-\d{5,}\.tar|.*\.tmp|" + "|".join(map(re.escape, (PLAN, DONE, REJECTED, META))))


class OutputFolder:
    """Context in which this process alone may write to ``path``.

    Args:
        path: the folder; made if missing.
        format: ``smalto-images`` or ``smalto-codes``.
        settings: everything that decides the content, as JSON; a job continues only what has equal settings.
        command: verb and main words, for messages: ``smalto prepare``.
        overwrite: remove what an earlier job left here, finished or not.
        helper: a process that works for the one that has the folder open: only ``path`` counts.

    Attributes:
        finished: meta.json when the folder was complete already, else None.
        done: records of the finished shards by name.

    Raises:
        FileExistsError: in use, made with other settings, or holding files that are not ours.
        OSError: disk full or not writable, as one message; finished shards stay.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        format: str,
        settings: dict,
        command: str,
        overwrite: bool,
        helper: bool = False,
    ) -> None:
        self.path = Path(path)
        self._helper = helper
        self.finished: dict[str, Any] | None = None
        self.done: dict[str, dict[str, Any]] = {}
        self._format, self._command, self._overwrite = format, command, overwrite
        self._settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
        self._lock: FileLock | None = None

    def __enter__(self) -> Self:
        if self._helper:
            return self
        try:
            if self.path.exists() and not self.path.is_dir():
                raise PathInUse(f"{self.path} is a file; out= must be a folder")
            if self._reuse():
                return self
            self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if not self._reuse():  # another process may have finished it meanwhile
                self._adopt()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if isinstance(error, OSError) and error.errno in _REASONS:
            raise StorageError(
                f"{_REASONS[error.errno]}: {error.filename or self.path}; finished shards stay in {self.path}, "
                "run the same command again to continue"
            ) from error

    def record(self, shard: dict[str, Any]) -> None:
        """Remember a finished shard (its file has its final name already)."""
        with (self.path / DONE).open("a") as file:
            file.write(json.dumps(shard) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[shard["name"]] = shard

    def check_listing(self, listing: dict[str, Any]) -> None:
        """Fix what the job reads; when continuing, it must be what the job began with.

        Raises:
            FileExistsError: the source changed in between.
        """
        plan = json.loads((self.path / PLAN).read_text())
        listing = json.loads(json.dumps(listing))
        if plan.setdefault("listing", listing) != listing:
            raise PathInUse(
                f"{self.path} was begun from {plan['listing']}, the source now gives {listing}; "
                "restore the source, choose another out=, or start anew with overwrite=true"
            )
        write_json(self.path / PLAN, plan)

    def finish(self, meta: dict[str, Any]) -> None:
        """Write meta.json: from here on the data set exists."""
        write_json(self.path / META, {"format": self._format, "version": VERSION, **meta})
        (self.path / DONE).unlink(missing_ok=True)
        shutil.rmtree(self.path / PARTS, ignore_errors=True)
        self.finished = json.loads((self.path / META).read_text())

    def _acquire(self) -> None:
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire()
        except PathInUse as error:
            raise PathInUse(f"{error}; wait for it to finish or choose another out=") from None
        self._lock = lock

    def _read_plan(self) -> dict[str, Any] | None:
        path = self.path / PLAN
        return json.loads(path.read_text()) if path.exists() else None

    def _reuse(self) -> bool:
        """Whether the folder is complete and as asked; needs no right to write."""
        plan = self._read_plan()
        if self._overwrite or plan is None or not (self.path / META).exists():
            return False
        self._check_settings(plan, "holds finished data")
        self.finished = json.loads((self.path / META).read_text())
        log.info("%s is complete already; overwrite=true would make it anew", self.path)
        return True

    def _adopt(self) -> None:
        """Continue our own unfinished work, or begin in an empty folder."""
        plan = self._read_plan()
        foreign = sorted(p.name for p in self.path.iterdir() if p.name != LOCK)
        if plan is None and foreign:
            raise PathInUse(
                f"{self.path} holds files {self._command} did not write ({', '.join(foreign[:3])}"
                f"{', ...' if len(foreign) > 3 else ''}); choose an empty or new folder as out="
            )
        if self._overwrite and plan is not None:
            (self.path / META).unlink(missing_ok=True)  # first: what is half removed must not look finished
            shutil.rmtree(self.path / PARTS, ignore_errors=True)
            for old in self.path.iterdir():
                if _OURS.fullmatch(old.name) and old.is_file():
                    old.unlink()
            plan = None
        if plan is None:
            write_json(self.path / PLAN, {"format": self._format, "settings": self._settings})
            return
        self._check_settings(plan, "holds an unfinished job")
        for leftover in self.path.glob("*.tmp"):
            leftover.unlink()
        self._read_done()

    def _check_settings(self, plan: dict[str, Any], state: str) -> None:
        old, new = plan.get("settings", {}), self._settings
        changed = [f"{k}: {old.get(k)} there, {new.get(k)} now" for k in {**old, **new} if old.get(k) != new.get(k)]
        if plan.get("format") != self._format:
            changed.insert(0, f"format: {plan.get('format')} there, {self._format} now")
        if changed:
            raise PathInUse(
                f"out={self.path} {state} made with other settings ({'; '.join(changed)}); "
                "choose another out=, or start anew with overwrite=true"
            )

    def _read_done(self) -> None:
        if not (self.path / DONE).exists():
            return
        for line in (self.path / DONE).read_text().splitlines(keepends=True):
            if not line.endswith("\n"):  # killed while writing this line: the shard is made again
                break
            shard = json.loads(line)
            file = self.path / shard["name"]
            if file.is_file() and file.stat().st_size == shard["bytes"]:
                self.done[shard["name"]] = shard
        write_bytes(self.path / DONE, "".join(json.dumps(s) + "\n" for s in self.done.values()).encode())
        log.info("%s: continuing, %d shards were finished", self.path, len(self.done))


_REASONS = REASONS | dict.fromkeys((errno.EACCES, errno.EPERM), "no permission to write")
