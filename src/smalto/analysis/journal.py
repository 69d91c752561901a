"""What is to be recorded of a run, kept in a file until MLflow has it."""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from smalto.analysis.entries import REFUSED, Entry, is_refusal, last_steps, pieces, send, texts
from smalto.analysis.store import experiment_id
from smalto.errors import StorageError
from smalto.files import write_bytes
from smalto.redact import redacted

log = logging.getLogger(__name__)

KEY = "smalto.record"
"""Tag that says which journal a run comes from: what is written again goes to the same run."""
BATCH = 1000
"""Metrics in one request, MLflow's limit; of parameters and tags it takes 100."""


def header(experiment: str, run_name: str, *, artifact_location: str | None, tags: dict[str, Any]) -> dict[str, Any]:
    """The first line of a journal: the run that is to be made.

    Args:
        experiment: its name.
        run_name: of the run.
        artifact_location: of a new experiment; None leaves it to the store.
        tags: on the run.
    """
    return {
        "experiment": experiment,
        "run_name": run_name,
        "artifact_location": artifact_location,
        "tags": texts(tags),
        "start": int(time.time() * 1000),
        "key": secrets.token_hex(8),
    }


class Journal:
    """Entries of one run, in order, and the run they go to. Entries may come from one thread while another delivers.

    Args:
        file: what is not delivered yet stands here, a line for each entry, so that a process that is killed loses
            nothing; there is no file when nothing waits. What an earlier process left in it is delivered first.
        header: of the run; None takes the one in the file.
        run_id: of the run, if it was made before.
        base: folder of the files that are recorded; None: that of ``file``.
        on_begin: told the id of every run that is made.
    """

    def __init__(
        self,
        file: Path,
        header: dict[str, Any] | None = None,
        *,
        run_id: str | None = None,
        base: Path | None = None,
        on_begin: Callable[[str], None] = lambda run_id: None,
    ) -> None:
        self.file = file
        self.run_id = run_id
        self.base = file.parent if base is None else base
        self._on_begin = on_begin
        lines = [*_lines(file)]
        first = lines.pop(0) if lines and "key" in lines[0] and "experiment" in lines[0] else {}
        if header is None and not first:
            raise StorageError(f"{file} does not say of which run it is; it is damaged, remove it")
        self._waiting = lines
        self.header = first | (header or {}) | ({"key": first["key"]} if first else {})
        self._origin: list[Entry] = []
        self._begun = False
        self._last: dict[str, int] = {}
        self._lock, self._delivering = threading.Lock(), threading.Lock()
        self._handle: FileIO | None = None
        self._head = 0

    @property
    def waiting(self) -> int:
        """How many entries are not delivered."""
        return len(self._waiting)

    def add(self, entry: Entry, *, origin: bool = False) -> None:
        """Note an entry; never fails, at worst it is in memory only.

        Args:
            entry: to deliver.
            origin: it says what the run is: one that begins anew needs it again.
        """
        with self._lock:
            self._waiting.append(entry)
            if origin:
                self._origin.append(entry)
            try:
                if self._handle is None:
                    self._open()
                else:
                    self._handle.write(_line(entry))
            except OSError as error:
                log.debug("%s: %s", self.file, error)

    def _open(self) -> None:
        write_lines(self.file, [self.header, *self._waiting])
        self._handle = self.file.open("ab", buffering=0)
        self._head = len(_line(self.header))

    def deliver(self, client: MlflowClient) -> None:
        """Bring the run and all entries to the store; what it refuses for good is left out with a warning.

        Raises:
            Exception: whatever the store's client raises when it cannot be reached; what is left waits.
        """
        with self._delivering:
            if not self._begun:
                self._begin(client)
            while batch := self._next():
                count, entry = batch
                entry, last = self._new(entry)
                if not self._send(client, entry):
                    continue  # a new run has begun, its origin goes first
                self._last = last
                with self._lock:
                    del self._waiting[:count]
            self._empty()

    def close(self) -> None:
        """Leave no file behind when nothing waits."""
        with self._lock:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            if not self._waiting:
                with suppress(OSError):
                    self.file.unlink(missing_ok=True)

    def save(self) -> None:
        """Have what waits on the disk, to last through a power cut."""
        with self._lock, suppress(OSError):
            if self._waiting and self._handle is not None:
                os.fsync(self._handle.fileno())

    def discard(self) -> None:
        """Drop what waits."""
        with self._lock:
            self._waiting.clear()

    def _empty(self) -> None:
        with self._lock:
            if not self._waiting and self._handle is not None:
                self._handle.truncate(self._head)

    def _next(self) -> tuple[int, Entry] | None:
        """The next entries as one, and how many they are; rows of metrics go together."""
        with self._lock:
            if not self._waiting:
                return None
            rows: list[Any] = []
            for count, entry in enumerate(self._waiting):
                if "metrics" not in entry or (count and len(rows) + len(entry["metrics"]) > BATCH):
                    return (count, {"metrics": rows}) if count else (1, entry)
                rows += entry["metrics"]
            return len(self._waiting), {"metrics": rows}

    def _begin(self, client: MlflowClient) -> None:
        """Find the run, or make it."""
        run_id = self.run_id
        gone = run_id is not None and not _is_active(client, run_id)
        if run_id is None or gone:
            experiment = experiment_id(client, self.header["experiment"], self.header["artifact_location"])
            key = secrets.token_hex(8) if gone else self.header["key"]
            # An earlier try may have made it before its answer was lost.
            found = client.search_runs([experiment], filter_string=f"tags.\"{KEY}\" = '{key}'", max_results=1)
            run_id = found[0].info.run_id if found else self._make(client, experiment, key)
        if gone:
            log.warning("run %s is not in MLflow, or was deleted there: it goes on as run %s", self.run_id, run_id)
        self.run_id = run_id
        self._last = last_steps(client, run_id)
        self._on_begin(run_id)
        self._begun = True

    def _make(self, client: MlflowClient, experiment: str, key: str) -> str:
        tags = resolve_tags(self.header["tags"]) | {KEY: key}
        name, start = self.header["run_name"], self.header["start"]
        return client.create_run(experiment, start_time=start, tags=tags, run_name=name).info.run_id

    def _new(self, entry: Entry) -> tuple[Entry, dict[str, int]]:
        """An entry without the numbers that the run has, which a continued run makes again; and what it has then."""
        if "metrics" not in entry:
            return entry, self._last
        rows, last = [], dict(self._last)
        for row in entry["metrics"]:
            name, step = row[0], row[3]
            if step > last.get(name, -1):
                last[name] = step
                rows.append(row)
        return {"metrics": rows}, last

    def _send(self, client: MlflowClient, entry: Entry) -> bool:
        """Whether an entry is done with; if not, its run was gone and another has begun."""
        assert self.run_id is not None
        try:
            send(client, self.run_id, entry, self.base)
        except Exception as error:
            if not is_refusal(error):
                raise
            if not _is_active(client, self.run_id):
                self._begin(client)
                with self._lock:
                    self._waiting[:0] = self._origin
                return False
            parts = list(pieces(entry))
            if len(parts) > 1:
                return all(self._send(client, part) for part in parts)
            # A continued run may differ in where it computes; MLflow keeps what was said first.
            level = logging.DEBUG if "params" in entry else logging.WARNING
            log.log(level, "MLflow does not take %s: %s", str(entry)[:200], redacted(str(error)).splitlines()[:1])
        return True


def write_lines(file: Path, entries: list[dict[str, Any]]) -> None:
    """A journal as a whole: its header and what follows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, b"".join(map(_line, entries)))


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry) + "\n").encode()


def _is_active(client: MlflowClient, run_id: str) -> bool:
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in REFUSED:
            raise
        return False
    return run.info.lifecycle_stage == "active"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The entries in a file; a line that is half written, by a process that was killed, is left out."""
    if not file.is_file():  # nothing, or a pipe, which would wait
        return
    try:
        text = file.read_text(errors="replace")
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("what waits for MLflow in %s cannot be read: %s", file, error)
        return
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            yield entry
