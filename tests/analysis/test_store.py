"""A store that cannot be used is told in one line within seconds; a database is made once, and moves with its files."""

import logging
import multiprocessing
import os
import shutil
import socket
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT

from smalto.analysis import store
from smalto.analysis.store import connect, experiment_id, impatient
from smalto.errors import StorageError
from smalto.files import TEMPORARY
from stores import database


class Quick(MlflowClient):
    """Makes a database by copying one, slowly, and counts how often."""

    def __init__(self, uri: str) -> None:
        file = Path(uri.removeprefix("sqlite:///"))
        if TEMPORARY.fullmatch(file.name):
            database(file.parent / f"made-{os.getpid()}")
            time.sleep(0.2)
            shutil.copy(file.parent / f"made-{os.getpid()}" / "mlflow.db", file)
        super().__init__(uri)


def connected(uri: str, outputs: Path, queue) -> None:
    try:
        queue.put(connect(uri, outputs=outputs).create_experiment(str(os.getpid())))
    except BaseException as error:
        queue.put(repr(error))


@pytest.mark.parametrize("maker", [Quick, pytest.param(MlflowClient, marks=pytest.mark.slow)])
def test_three_first_commands_at_once_make_one_database(tmp_path, monkeypatch, maker):
    database(tmp_path / "template")
    monkeypatch.setattr(store, "MlflowClient", maker)
    context = multiprocessing.get_context("fork")
    queue, uri = context.Queue(), f"sqlite:///{tmp_path}/new/mlflow.db"
    processes = [context.Process(target=connected, args=(uri, tmp_path / "new", queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(queue.get(timeout=120) for _ in processes) == ["1", "2", "3"]
    for process in processes:
        process.join()
    assert [file.name for file in (tmp_path / "new").iterdir() if file.is_file()] == ["mlflow.db"]
    assert len(list((tmp_path / "new").glob("made-*"))) == (maker is Quick)


def test_a_database_whose_making_was_killed_is_made_again(tmp_path, monkeypatch):
    file = tmp_path / "mlflow.db"

    def killed(uri: str) -> None:
        sqlite3.connect(uri.removeprefix("sqlite:///")).execute("CREATE TABLE runs (half INTEGER)")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "MlflowClient", killed)
    with pytest.raises(KeyboardInterrupt):
        connect(f"sqlite:///{file}")
    assert not file.exists()
    for left in ("mlflow.db", "mlflow.db.0123abcd.tmp", "mlflow.db.0123abcd.tmp-journal"):  # by kill -9
        (tmp_path / left).touch()
    monkeypatch.setattr(store, "MlflowClient", Quick)
    assert connect(f"sqlite:///{file}").search_experiments()
    assert [left.name for left in tmp_path.iterdir() if left.is_file()] == ["mlflow.db"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def deaf_port():
    """Of a server that takes connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def broken(kind: str, folder: Path, deaf: int) -> tuple[str, str]:
    """The address of a store that cannot be used, and what must be said of it."""
    uri, file = database(folder), folder / "mlflow.db"
    if kind == "absent":
        return f"http://joe:swordfish@127.0.0.1:{free_port()}", "Connection refused.*MLFLOW_TRACKING_URI"
    if kind == "deaf":
        return f"http://127.0.0.1:{deaf}", "timed out"
    if kind == "no database":
        file.write_bytes(b"swordfish" * 1000)
        return uri, "no database or is damaged; move it away"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
        return uri, "damaged; move it away"
    if kind == "other version":
        with sqlite3.connect(file) as old:
            old.execute("UPDATE alembic_version SET version_num = 'abc'")
        return uri, "another version of MLflow.*mlflow db upgrade sqlite"
    if kind == "nowhere":
        return "sqlite:////proc/nowhere/mlflow.db", "No such file"
    return uri, "another program holds the database locked"


@pytest.mark.parametrize("kind", ["absent", "deaf", "no database", "truncated", "other version", "nowhere", "locked"])
def test_what_is_wrong_is_said_in_one_line_within_seconds(kind, tmp_path, deaf_port, monkeypatch, capfd):
    monkeypatch.setattr(store, "CHECK_SECONDS", 1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
    uri, said = broken(kind, tmp_path, deaf_port)
    level = logging.getLogger("mlflow").level
    capfd.readouterr()
    began = time.monotonic()
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    if kind == "locked":
        holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StorageError, match=said) as caught:
        connect(uri, outputs=tmp_path)
    holder.close()
    assert time.monotonic() - began < 5
    assert "\n" not in str(caught.value)
    assert "swordfish" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert capfd.readouterr().err == ""
    assert (MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()) == (7, 120)
    assert logging.getLogger("mlflow").level == level


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    uri = database(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written; set MLFLOW_TRACKING_URI"):
        connect(uri)


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_artifacts_go_where_outputs_is(tmp_path, how):
    first, second = tmp_path / "A", tmp_path / "B"
    client = connect(database(first), outputs=first)
    experiment = experiment_id(client, "prepare", f"{first}/mlruns/prepare")
    elsewhere = client.create_experiment("elsewhere", artifact_location="s3://bucket/mlruns/x")
    run = client.create_run(experiment).info.run_id
    before = first / "mlruns" / "prepare" / run / "artifacts" / "before.txt"
    before.parent.mkdir(parents=True)
    before.touch()
    (first.rename if how == "moved" else lambda to: shutil.copytree(first, to))(second)
    client = connect(f"sqlite:///{second}/mlflow.db", outputs=second)
    client.log_text(run, "after", "after.txt")
    new = client.create_run(experiment).info.run_id
    client.log_text(new, "new", "new.txt")
    assert [file.path for file in client.list_artifacts(run)] == ["after.txt", "before.txt"]
    assert (second / "mlruns" / "prepare" / new / "artifacts" / "new.txt").exists()
    assert client.get_experiment(elsewhere).artifact_location == "s3://bucket/mlruns/x"
    assert first.exists() == (how == "copied")
    if how == "copied":
        assert sorted(file.name for file in first.rglob("*.txt")) == ["before.txt"]


def test_a_link_to_outputs_is_the_same_place(tmp_path):
    first, link = tmp_path / "A", tmp_path / "link"
    client = connect(database(first), outputs=first)
    experiment = experiment_id(client, "prepare", f"{first}/mlruns/prepare")
    link.symlink_to(first)
    client = connect(f"sqlite:///{link}/mlflow.db", outputs=link)
    assert client.get_experiment(experiment).artifact_location == f"{first}/mlruns/prepare"


def test_a_deleted_experiment_stays_deleted_and_a_new_one_begins(tmp_path, caplog):
    client = connect(database(tmp_path))
    old = experiment_id(client, "prepare", str(tmp_path))
    run = client.create_run(old).info.run_id
    client.delete_experiment(old)
    new = experiment_id(client, "prepare", str(tmp_path))
    assert new != old
    assert client.get_experiment_by_name("prepare").experiment_id == new
    assert client.get_experiment(old).lifecycle_stage == "deleted"
    assert client.get_run(run).info.lifecycle_stage == "deleted"
    assert "prepare was deleted in MLflow" in caplog.text


def test_how_long_calls_may_take_is_of_one_thread_and_no_longer(monkeypatch):
    """The environment is not touched: it is of all threads, and of C code that reads it meanwhile."""
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    entered, leave = threading.Event(), threading.Event()

    def limits() -> tuple[int, int]:
        return MLFLOW_HTTP_REQUEST_MAX_RETRIES.get(), MLFLOW_HTTP_REQUEST_TIMEOUT.get()

    def check() -> None:
        with impatient(5, retries=0, always=True):
            seen.append(limits())
            entered.set()
            leave.wait(20)

    seen: list[tuple[int, int]] = []
    usual, level, before = limits(), logging.getLogger("mlflow").level, dict(os.environ)
    thread = threading.Thread(target=check)
    with impatient(20, retries=1):
        thread.start()
        entered.wait(20)
        assert (limits(), seen) == ((1, 60), [(0, 5)])
        assert dict(os.environ) == before
    assert limits() == usual
    assert logging.getLogger("mlflow").level == logging.CRITICAL
    leave.set()
    thread.join()
    assert logging.getLogger("mlflow").level == level


def test_an_experiment_that_another_process_has_just_made_is_taken(tmp_path, monkeypatch):
    client = connect(database(tmp_path))
    made, seen = client.create_experiment("prepare"), client.get_experiment_by_name
    answers = iter([None])
    monkeypatch.setattr(client, "get_experiment_by_name", lambda name: next(answers, seen(name)))
    assert experiment_id(client, "prepare", str(tmp_path)) == made
