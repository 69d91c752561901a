"""Files appear whole or not at all, whoever writes beside us; a lock is one process's and follows no link."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from smalto.errors import PathInUse, StorageError
from smalto.files import TEMPORARY, FileLock, alone_in, replacing, write_bytes


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            assert TEMPORARY.fullmatch(temporary.name)
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"old")]


def test_writers_of_one_path_do_not_meet(tmp_path):
    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(10):
            list(pool.map(lambda data: write_bytes(tmp_path / "file", data), contents))
            assert (tmp_path / "file").read_bytes() in contents
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_lock_is_held_by_one_process_and_freed_when_it_dies(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from smalto.files import FileLock\n"
        "with FileLock(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "in\n"
            lock = FileLock(path)
            assert not lock.try_acquire()
            with pytest.raises(PathInUse, match=rf"in use by process {other.pid} on "):
                lock.acquire()
        finally:
            other.kill()
    with lock:
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "nothing", "folder"])
def test_a_planted_link_is_not_followed(tmp_path, kind):
    target = tmp_path / "precious"
    if kind == "file":
        target.write_text("words")
    elif kind == "folder":
        target.mkdir()
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(StorageError, match="is a link, or no plain file; remove it"):
        FileLock(tmp_path / "lock").acquire()
    assert target.exists() == (kind != "nothing")
    assert kind != "file" or target.read_text() == "words"


def test_what_is_in_a_lock_file_of_another_form_does_not_matter(tmp_path):
    (tmp_path / "lock").write_bytes(b"process 99999999999999999999 on \xff")
    with FileLock(tmp_path / "lock", keep=True) as lock:
        assert lock.owner().startswith("process ")
    assert (tmp_path / "lock").exists()


def test_a_folder_is_held_once_and_by_one(tmp_path):
    with alone_in(tmp_path / "made"):
        with alone_in(tmp_path / "made" / ".." / "made"):  # by whom it is held already
            pass
        other = FileLock(tmp_path / "made" / ".lock")
        assert not other.try_acquire()
    with other, pytest.raises(PathInUse, match=rf"in use by process {os.getpid()} on .*wait until it has ended"):
        alone_in(tmp_path / "made").__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/in cannot be written to: Not a directory"):
        alone_in(tmp_path / "file" / "in").__enter__()
