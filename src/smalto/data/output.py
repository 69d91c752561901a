"""The folder a long job fills: one writer at a time, continued after a kill, finished once meta.json is
there.

Files beside the results: ``plan.json`` (what is being made, so that another job cannot continue it),
``done.jsonl`` (finished shards, until the end), ``.lock`` (while a process works), ``meta.json`` (last).
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from smalto.data.output_plan import DONE, LOCK, PARTS, PLAN, SAMPLES, SHARD, Plan, differences, written_under
from smalto.data.shards import CODES, META, VERSION
from smalto.errors import REASONS, PathInUse, StorageError
from smalto.files import FileLock, write_bytes, write_json

log = logging.getLogger(__name__)


class OutputFolder:
    """Context in which this process alone may write to ``path``, from ``begin`` on.

    Entered, it is locked and known to be free, finished, or begun by this very job; nothing in it has changed. What a
    job can check it checks then: refused before ``begin``, it leaves the folder as it was. A folder in which nothing
    was made yet may be begun with other settings.

    Args:
        path: the folder; made if missing.
        format: ``smalto-images``, ``smalto-codes`` or ``smalto-samples``.
        settings: everything that decides the content, as JSON; a job continues only what has equal settings. Those of
            samples count them in ``num_images``.
        command: verb and main words, for messages: ``smalto prepare``.
        overwrite: remove what an earlier job made here, finished or not; files of others stay.
        helper: a process that works for the one that has the folder open: only ``path`` counts.
        reads: files and folders that the job reads; what is inside ``path`` would be removed as an earlier result.
        earlier: settings that an older version wrote to what this one would write.

    Attributes:
        finished: meta.json when the folder was complete already, else None.
        done: records of the finished shards by name.

    Raises:
        FileExistsError: in use, made with other settings, holding files that are not ours, or finished and damaged.
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
        reads: Sequence[str | Path] = (),
        earlier: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings,
    ) -> None:
        self.path = Path(path)
        self._helper = helper
        self.finished: dict[str, Any] | None = None
        self.done: dict[str, dict[str, Any]] = {}
        self._reads = reads
        self._command, self._overwrite, self._earlier = command, overwrite, earlier
        self._plan = Plan(format, json.loads(json.dumps(settings)))  # as it will be read back: tuples are lists
        self._lock: FileLock | None = None
        self._made: list[Path] = []  # folders that go again if the job does not begin
        self._began = False

    def __enter__(self) -> Self:
        if self._helper:
            return self
        try:
            if self.path.exists() and not self.path.is_dir():
                raise PathInUse(f"{self.path} is a file; out= must be a folder")
            inside = [path for path in self._reads if Path(path).resolve().is_relative_to(self.path.resolve())]
            if inside:
                raise PathInUse(
                    f"out={self.path} is where {self._command} reads from ({inside[0]}); choose another out="
                )
            if self._reuse():
                return self
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_ours()  # before there is a lock file in it
            self._acquire()
            if not self._reuse():  # another process may have finished it meanwhile
                self._check_free()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if not self._began:
            with suppress(OSError):  # no longer empty: others work there
                for folder in self._made:
                    folder.rmdir()
        if isinstance(error, OSError) and error.errno in _REASONS:
            again = "same command again" + (" without overwrite=true" if self._overwrite else "")
            raise StorageError(
                f"{_REASONS[error.errno]}: {error.filename or self.path}; finished shards stay in {self.path}, "
                f"run the {again} to continue"
            ) from error
        if isinstance(error, OSError) and error.errno in _WRONG_PATHS:
            raise StorageError(f"out={self.path}: {_WRONG_PATHS[error.errno]}; give another path as out=") from error

    def begin(self, listing: dict[str, Any] | None = None) -> None:
        """Make the folder this job's own: go on with what it made before, or clear what may go and start.

        Args:
            listing: what the job reads; when continuing, it must be what the job began with.

        Raises:
            FileExistsError: the source changed in between.
        """
        if self._helper:
            return
        new = Plan(self._plan.format, self._plan.settings, json.loads(json.dumps(listing)))
        old = Plan.read(self.path)
        if old is not None and (self._overwrite or not self._goes_on(old, new)):
            self._check_foreign(set(new.results(self.path)) - set(old.results(self.path)))
            old.clear(self.path)
            old = None
        if old is None:
            for path in self.path.iterdir():
                if PLAN in written_under(path.name):
                    path.unlink()
        else:
            for path in old.unfinished(self.path):
                path.unlink(missing_ok=True)
            self._read_done()
        if old != new:
            new.write(self.path)
        self._began = True

    def record(self, shard: dict[str, Any]) -> None:
        """Remember a finished shard (its file has its final name already)."""
        assert self._began
        with (self.path / DONE).open("a") as file:
            file.write(json.dumps(shard) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[shard["name"]] = shard

    def discard(self) -> None:
        """Remove results that hold nothing, so that the job may be begun with other settings."""
        assert self._began
        for path in (*self._plan.results(self.path), self.path / DONE):
            path.unlink(missing_ok=True)
        self.done.clear()

    def finish(self, meta: dict[str, Any]) -> None:
        """Write meta.json: from here on the data set exists."""
        assert self._began
        write_json(self.path / META, {"format": self._plan.format, "version": VERSION, **meta})
        (self.path / DONE).unlink(missing_ok=True)
        if self._plan.format == CODES:
            for path in self._plan.results(self.path):
                if path.parent == self.path / PARTS:
                    path.unlink()
            self._plan.leave_room(self.path)
        self.finished = json.loads((self.path / META).read_text())

    def _acquire(self) -> None:
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire()
        except PathInUse as error:
            raise PathInUse(f"{error}; wait for it to finish or choose another out=") from None
        self._lock = lock

    def _reuse(self) -> bool:
        """Whether the folder is complete and as asked; needs no right to write."""
        if self._overwrite or not (self.path / META).exists():
            return False
        plan = Plan.read(self.path)
        if plan is None or plan.clearing:
            return False
        self._check_settings(plan, "holds finished data")
        self.finished = self._read_finished()
        log.info("%s is complete already; overwrite=true would make it anew", self.path)
        return True

    def _read_finished(self) -> dict[str, Any]:
        """meta.json of the finished data, which is still there."""
        anew = "restore it, or make all anew with overwrite=true"
        try:
            meta = json.loads((self.path / META).read_bytes())
            shards = [shard for split in meta.get("splits", {}).values() for shard in split["shards"]]
            sizes = {self.path / shard["name"]: shard["bytes"] for shard in shards}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, FileNotFoundError) as error:
            raise PathInUse(f"{self.path / META} is damaged; {anew}") from error
        if self._plan.format == SAMPLES:
            sizes[self.path / "samples.npz"] = None
        for file, size in sizes.items():
            if not file.is_file():
                raise PathInUse(f"{self.path} was finished, but {file.name} is missing now; {anew}")
            if size not in (None, file.stat().st_size):
                raise PathInUse(
                    f"{self.path} was finished, but {file.name} has {file.stat().st_size} bytes now, {META} says "
                    f"{size}; {anew}"
                )
        return meta

    def _check_ours(self) -> Plan | None:
        """The plan in the folder; without one it is empty."""
        plan = Plan.read(self.path)
        if plan is None:
            owner = FileLock(self.path / LOCK).owner()
            known = {PLAN, *([LOCK] if not owner or owner.startswith("process ") else [])}
            paths = list(self.path.iterdir())
            if PLAN not in {path.name for path in paths}:  # by another process, which has the lock then
                self._check_foreign(
                    {path for path in paths if known.isdisjoint({path.name, *written_under(path.name)})}
                )
        return plan

    def _check_foreign(self, paths: set[Path]) -> None:
        if paths:
            names = sorted(path.relative_to(self.path).as_posix() for path in paths)
            raise PathInUse(
                f"{self.path} holds files {self._command} did not write ({', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}); choose an empty or new folder as out="
            )

    def _check_free(self) -> None:
        """Whether this job may begin or go on here; nothing is changed."""
        plan = self._check_ours()
        self._plan.check_place(self.path)
        if plan is not None:
            plan.check_place(self.path)
            if not self._overwrite and not plan.clearing and self._changed(plan) and self._is_begun(plan):
                self._check_settings(plan, "holds an unfinished job")

    def _is_begun(self, plan: Plan) -> bool:
        """Whether anything was made."""
        return (self.path / META).exists() or bool(plan.results(self.path))

    def _goes_on(self, old: Plan, new: Plan) -> bool:
        """Whether ``old`` was the same job; if not, nothing of it may be lost."""
        if old.clearing:
            return False
        same = not self._changed(old) and old.listing in (None, new.listing)
        if not same and self._is_begun(old):
            self._check_settings(old, "holds an unfinished job")
            raise PathInUse(
                f"{self.path} was begun from {old.listing}, the source now gives {new.listing}; "
                "restore the source, choose another out=, or start anew with overwrite=true"
            )
        return same

    def _changed(self, plan: Plan) -> list[str]:
        """What differs from the settings of ``plan``."""
        old, new = self._earlier(plan.settings), self._plan.settings
        changed = differences(old, new)
        if plan.format != self._plan.format:
            changed.insert(0, f"format: {plan.format} there, {self._plan.format} now")
        return changed

    def _check_settings(self, plan: Plan, state: str) -> None:
        changed = self._changed(plan)
        if changed:
            raise PathInUse(
                f"out={self.path} {state} made with other settings ({'; '.join(changed)}); "
                "choose another out=, or start anew with overwrite=true"
            )

    def _read_done(self) -> None:
        if not (self.path / DONE).exists():
            return
        for line in (self.path / DONE).read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):  # killed while writing this line: the shard is made again
                break
            try:
                shard = json.loads(line)
                name, size = shard["name"], shard["bytes"]
            except (ValueError, TypeError, KeyError, RecursionError):  # a power cut: the same
                continue
            if not SHARD.fullmatch(str(name)):
                continue
            file = self.path / name
            if file.is_file() and file.stat().st_size == size:
                self.done[name] = shard
        write_bytes(self.path / DONE, "".join(json.dumps(s) + "\n" for s in self.done.values()).encode())
        log.info("%s: continuing, %d shards were finished", self.path, len(self.done))


_REASONS = REASONS | dict.fromkeys((errno.EACCES, errno.EPERM), "no permission to write")
_WRONG_PATHS = {
    errno.ENOTDIR: "a file is where a folder should be",
    errno.ENAMETOOLONG: "the name is longer than the file system allows",
}
