"""Recording in MLflow that neither ends nor delays what it records."""

import logging
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from smalto.analysis.entries import Entry, ended, measured, parameters
from smalto.analysis.journal import Journal, header, write_lines
from smalto.analysis.store import CALL_SECONDS, connect, impatient, reason
from smalto.errors import StorageError
from smalto.files import FileLock
from smalto.redact import redacted

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds for which work waits for a store that does answer, but slowly: then what is left is kept for later."""
FIRST_PAUSE, LONGEST_PAUSE = 10.0, 300.0
"""Seconds until a store that failed is tried again; doubled each time."""
PENDING = "mlflow_pending"
"""Folder in ``outputs`` with journals of finished jobs that MLflow does not have yet."""
LEAVE_ALONE = 60.0
"""Seconds for which a process that found a store absent does not try it again for finished jobs."""
WITHOUT = "logger=csv trains without MLflow, mlflow=false runs other commands without it"

_failed: dict[str, float] = {}
"""When a store failed, by its address."""


class Recorder:
    """Takes entries at once and brings them to the store in a thread; a store that fails is told in one warning.

    Args:
        journal: of the run.
        uri: of the store.
        outputs: the folder of all runs.
        later: what delivers the rest, for people.
    """

    def __init__(self, journal: Journal, uri: str, outputs: Path | None, *, later: str) -> None:
        self.journal = journal
        self._uri, self._outputs, self._later = uri, outputs, later
        self._client: MlflowClient | None = None
        self._thread: threading.Thread | None = None
        self._change = threading.Condition()
        self._wanted = self._closing = False
        self._tries = 0
        self._error: Exception | None = None
        self._warned = False
        self._next_try, self._pause = 0.0, FIRST_PAUSE

    def begin(self) -> bool:
        """Find or make the run now, within seconds; whether the store took it."""
        with self._change:
            self._wanted = True
            before = self._tries
            self._work()
            self._change.wait_for(lambda: self._tries > before, PATIENCE)
        return self.journal.run_id is not None and self._error is None

    def add(self, entry: Entry, *, origin: bool = False) -> None:
        """Record an entry, now or later; see :meth:`Journal.add`."""
        self.journal.add(entry, origin=origin)
        with self._change:
            self._work()

    def close(self) -> bool:
        """Wait for what is on its way, with one more try if the store failed; whether everything is there."""
        with self._change:
            self._wanted = self._closing = True
            self._work()
            thread = self._thread
        assert thread is not None
        thread.join(PATIENCE)
        with self._change:
            self._closing = thread.is_alive()
        if self.journal.waiting:
            log.warning("%s keeps what MLflow does not have yet; %s", self.journal.file, self._later)
        elif not thread.is_alive():
            self.journal.close()
        return not self.journal.waiting

    def forget(self) -> None:
        """Remove the run, and what waits for it: what it was about never began."""
        self.journal.discard()
        self.close()
        try:
            if self._client is not None and self.journal.run_id is not None:
                with impatient(CALL_SECONDS, retries=1):
                    self._client.delete_run(self.journal.run_id)
        except Exception as error:
            log.warning("run %s stays: %s", self.journal.run_id, told(error, self._uri))

    def _work(self) -> None:
        """Wake the thread, or start it; the caller holds the condition."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="mlflow")
            self._thread.start()
        self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._due():
                    pause = self._next_try - time.monotonic()
                    self._change.wait(pause if self.journal.waiting and pause > 0 else None)
                closing, self._wanted = self._closing, False
            self._try()
            with self._change:
                self._tries += 1
                self._change.notify_all()
                if closing and (self._error is not None or not self.journal.waiting):
                    self._thread = None
                    return

    def _due(self) -> bool:
        waits = self._wanted or bool(self.journal.waiting)
        return self._closing or (waits and time.monotonic() >= self._next_try)

    def _try(self) -> None:
        try:
            with impatient(CALL_SECONDS, retries=1):
                if self._client is None:
                    self._client = connect(self._uri, outputs=self._outputs)
                self.journal.deliver(self._client)
        except Exception as error:  # whatever it is, it is not the work
            if not self._warned:
                text = "%s. The work goes on; %s keeps what belongs there (%s)"
                log.warning(text, told(error, self._uri), self.journal.file, WITHOUT)
            self._warned, self._error = True, error
            leave_alone(self._uri)
            self._next_try = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        else:
            if self._error is not None:
                log.info("MLflow answers again and has what was kept")
            self._error, self._next_try, self._pause = None, 0.0, FIRST_PAUSE


def leave_alone(uri: str) -> None:
    """Note that a store has failed just now."""
    _failed[uri] = time.monotonic()


def is_left_alone(uri: str) -> bool:
    """Whether a store failed a moment ago: of many finished jobs the first has waited for it, not each."""
    return uri in _failed and time.monotonic() < _failed[uri] + LEAVE_ALONE


def told(error: Exception, uri: str) -> str:
    """What is wrong with a store, in one line."""
    return str(error) if isinstance(error, StorageError) else f"MLflow at {redacted(uri)}: {reason(error, uri)}"


def record_job(
    uri: str,
    outputs: Path,
    *,
    experiment: str,
    run_name: str,
    params: dict[str, Any],
    metrics: dict[str, float],
    tags: dict[str, Any],
    artifacts: list[Path],
) -> None:
    """Record a job that is over (prepare, extract, sample, evaluate) as a finished run, now or later."""
    top = header(experiment, run_name, artifact_location=None, tags=tags)
    name = f"{top['start']}-{top['key']}"
    try:
        entries = [
            parameters(params, 6000),
            measured(metrics),
            *({"artifact": _portable(path, outputs, name)} for path in artifacts),
            ended("FINISHED"),
        ]
        write_lines(outputs / PENDING / f"{name}.jsonl", [top, *entries])
    except OSError as error:
        log.warning("not recorded in MLflow: %s", error)
        return
    write_pending(uri, outputs)


def _portable(path: Path, outputs: Path, name: str) -> str:
    """A path in ``outputs``, right also when that is moved before the job is recorded; a file elsewhere is copied."""
    path, outputs = path.resolve(), outputs.resolve()
    if not path.is_relative_to(outputs):
        copy = outputs / PENDING / name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        path = Path(shutil.copyfile(path, copy))
    return str(path.relative_to(outputs))


def place_of(uri: str, wanted: str) -> str | None:
    """Where a new experiment has the files of its runs. A server has a place of its own, and may not see this disk."""
    remote = uri.startswith(("http:", "https:", "databricks"))
    return None if remote and wanted.startswith("/") else wanted


def write_pending(uri: str, outputs: Path) -> None:
    """Bring the jobs that wait in ``outputs`` to the store, each once, whoever else tries it at the same time.

    A store that fails is told in one warning, and left alone for a while by this process.
    """
    folder = outputs / PENDING
    if not any(folder.glob("*.jsonl")) or is_left_alone(uri):
        return
    errors: list[Exception] = []
    thread = threading.Thread(target=_write_pending, args=(uri, outputs, errors), daemon=True, name="mlflow")
    thread.start()
    thread.join(PATIENCE)
    if errors or thread.is_alive():
        leave_alone(uri)
        why = told(errors[0], uri) if errors else f"MLflow at {redacted(uri)} is slow"
        log.warning("%s. %s keeps what belongs there, and the next command writes it (%s)", why, folder, WITHOUT)


def _write_pending(uri: str, outputs: Path, errors: list[Exception]) -> None:
    try:
        with impatient(CALL_SECONDS, retries=1):
            client = connect(uri, outputs=outputs)
            for file in sorted((outputs / PENDING).glob("*.jsonl")):
                lock = FileLock(file.with_suffix(".lock"))
                if not lock.try_acquire():
                    continue  # another process is at it
                with lock:
                    try:
                        if file.exists():
                            journal = Journal(file, base=outputs)
                            wanted = f"{outputs}/mlruns/{journal.header['experiment']}"
                            if ".." in Path(wanted).parts:
                                raise StorageError(f"{file} leads out of {outputs}; it is damaged, remove it")
                            journal.header["artifact_location"] = place_of(uri, wanted)
                            journal.deliver(client)
                            file.unlink()
                            shutil.rmtree(file.with_suffix(""), ignore_errors=True)
                    except Exception as error:  # of this one job, unless the store is gone
                        errors.append(error)
                        connect(uri, outputs=outputs)
            with suppress(OSError):
                (outputs / PENDING).rmdir()
    except Exception as error:
        errors.append(error)
