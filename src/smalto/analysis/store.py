"""The MLflow store: opened and checked within seconds, made under a lock, and brought along when ``outputs`` moves."""

import logging
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException

from smalto.errors import StorageError
from smalto.files import FileLock, replacing
from smalto.redact import redacted

log = logging.getLogger(__name__)

CHECK_SECONDS = 5
"""How long a store may take to answer before it counts as absent."""
CALL_SECONDS = 20
"""The same for a call later on; the environment variable has the last word."""
CREATION_SECONDS = 60
"""How long another process may take to make the database."""


def connect(uri: str, *, outputs: Path | None = None) -> MlflowClient:
    """A client of a store that answers; a database in a file is made if it is missing.

    Args:
        uri: of the store.
        outputs: the folder of all runs. A database that lies in it has the files of its runs there too: when the
            folder was moved or copied, its addresses are brought up to date.

    Raises:
        StorageError: the store is absent, broken, locked, read-only or of another version, in one line.
    """
    try:
        with impatient(CHECK_SECONDS, retries=0, always=True):
            database = sqlite_file(uri)
            if database is not None:
                prepare_database(database)
                if outputs is not None and database.parent.resolve() == outputs.resolve():
                    follow_move(database, outputs)
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # whatever MLflow, SQLAlchemy, alembic or requests make of it
        raise StorageError(f"MLflow at {redacted(uri)} cannot be used: {reason(error, uri)}") from error
    return client


class _Patience(threading.local):
    """How long the calls of one thread wait: values of MLflow's settings, and whether they go before the environment.

    Set here and not in the environment: a change of that, in a thread, while training goes on, can crash C code that
    reads it.
    """

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.always = False


_patience = _Patience()
_quiet = threading.Lock()
_levels: list[int] = []
"""Level of MLflow's logger before each of the calls that are on their way, whatever their threads."""


@cache
def _listen() -> None:
    """Have MLflow ask for the patience of the thread, for the rest of the process."""
    for variable in (MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT):

        def get(variable: Any = variable, usual: Callable[[], int] = variable.get) -> int:
            given = variable.name in _patience.values and (_patience.always or not variable.is_set())
            return _patience.values[variable.name] if given else usual()

        variable.get = get  # type: ignore[method-assign]


@contextmanager
def impatient(seconds: int, *, retries: int, always: bool = False) -> Iterator[None]:
    """Calls of MLflow's REST client end soon, and MLflow does not print tracebacks of what is told in one line.

    Args:
        seconds: for an answer.
        retries: after a failure; MLflow's own 7 with growing pauses are minutes.
        always: whatever the environment says; else that has the last word.
    """
    _listen()
    logger = logging.getLogger("mlflow")
    before = _patience.values, _patience.always
    _patience.values = {MLFLOW_HTTP_REQUEST_MAX_RETRIES.name: retries, MLFLOW_HTTP_REQUEST_TIMEOUT.name: seconds}
    _patience.always = always
    with _quiet:
        _levels.append(logger.level)
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _patience.values, _patience.always = before
        with _quiet:
            level = _levels.pop()
            if not _levels:
                logger.setLevel(level)


def reason(error: BaseException, uri: str) -> str:
    """What is wrong with a store and what helps, without the pages that its layers wrap around it."""
    text = redacted(str(error)) or type(error).__name__
    if "database is locked" in text:
        return "another program holds the database locked"
    if "not a database" in text or "malformed" in text:
        return "the file is no database or is damaged; move it away, and a new one is made"
    if "readonly database" in text or isinstance(error, PermissionError):
        return "it cannot be written; set MLFLOW_TRACKING_URI to another place"
    if "out-of-date database schema" in text or "Can't locate revision" in text:
        return f"another version of MLflow made it; keep a copy and run: mlflow db upgrade {redacted(uri)}"
    cause = re.search(r"\[Errno -?\d+\] [\w ]+|timed out|[Nn]ame or service not known|Failed to resolve", text)
    if uri.startswith("http"):
        found = cause[0] if cause else text.splitlines()[0][:200]
        return f"no answer ({found}); start the server, or set MLFLOW_TRACKING_URI to the right address"
    what = text.splitlines()[0][:200]
    return f"{what}; if that stays so, move the file away, and a new one is made" if sqlite_file(uri) else what


def sqlite_file(uri: str) -> Path | None:
    """The file of a store that is one."""
    name = uri.removeprefix("sqlite:///")
    return Path(name) if name != uri and name not in ("", ":memory:") else None


def prepare_database(file: Path) -> None:
    """Make the database if it is missing, once for all processes that ask, and check that it can be written.

    Raises:
        OSError: it cannot be made.
        sqlite3.Error: it is locked, read-only or no database.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not _exists(file):
        lock = FileLock(file.with_name(f"{file.name}.lock"))
        lock.acquire(patience=CREATION_SECONDS)
        with lock:
            if not _exists(file):
                for leftover in file.parent.glob(f"{file.name}.*.tmp*"):  # of a process that was killed here
                    leftover.unlink()
                # MLflow builds it in dozens of steps; nobody sees it before the last, nor after a kill in between.
                with replacing(file) as temporary:
                    MlflowClient(f"sqlite:///{temporary}").search_experiments(max_results=1)
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        raise PermissionError(f"{file} cannot be written")
    with closing(sqlite3.connect(file, timeout=CHECK_SECONDS, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        database.execute("ROLLBACK")


def _exists(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def follow_move(file: Path, outputs: Path) -> None:
    """Bring the places of artifacts to ``outputs/mlruns`` if the database came from another folder with them.

    Without this, what new runs leave would go to the folder that was moved or copied, made anew where it is gone.
    """
    with closing(sqlite3.connect(file, timeout=CHECK_SECONDS, isolation_level=None)) as database:
        # Number 0 is MLflow's own, with the folder in which the database was made; nothing goes there.
        named = database.execute("SELECT artifact_location FROM experiments WHERE experiment_id != 0")
        places = {row[0] for row in named if row[0]}
        stale = {root for place in places if (root := _root(place)) is not None and not _is(root, outputs)}
        if not stale:
            return
        database.execute("BEGIN IMMEDIATE")
        for root in stale:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (f"{outputs}/mlruns/", len(root) + 1, len(root), root),
                )
        database.execute("COMMIT")
    log.info("%s came from %s: the files of its runs are looked for in %s now", file, ", ".join(stale), outputs)


def _root(place: str) -> str | None:
    """``A/mlruns/`` of a local place of artifacts, as it is written there."""
    found = re.match(r"((?:file://)?/.*/mlruns/)[^/]*$", place.rstrip("/"))
    return found[1] if found else None


def _is(root: str, outputs: Path) -> bool:
    return Path(root.removeprefix("file://")).parent.resolve() == outputs.resolve()


def experiment_id(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    """The experiment called ``name``, made if there is none.

    One that was deleted in MLflow stays deleted, under a name with the date, so that its own is free.
    """
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "active":
        return found.experiment_id
    if found is not None:
        aside = f"{name} (deleted, {found.experiment_id})"
        client.restore_experiment(found.experiment_id)  # only an active one can be renamed
        client.rename_experiment(found.experiment_id, aside)
        client.delete_experiment(found.experiment_id)
        log.warning("experiment %s was deleted in MLflow: it is called %r there now, and a new one begins", name, aside)
    try:
        return client.create_experiment(name, artifact_location=artifact_location)
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another process may have been faster
        if found is None or found.lifecycle_stage != "active":
            raise
        return found.experiment_id
