import errno
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from smalto.data.output import OutputFolder
from smalto.data.output_plan import DONE, LOCK, PLAN
from smalto.data.pool import ordered_map
from smalto.data.write import TarShard


def folder(path, *, overwrite=False, **settings):
    return OutputFolder(path, format="smalto-images", settings=settings, command="smalto prepare", overwrite=overwrite)


@contextmanager
def begun(path, *, overwrite=False, listing=None, **settings):
    with folder(path, overwrite=overwrite, **settings) as job:
        if job.finished is None:
            job.begin(listing)
        yield job


def shard(job, name):
    with TarShard(job.path / name) as tar:
        tar.add("a", b"a")
        job.record(tar.close())


def test_a_job_finishes_and_is_then_reused(tmp_path):
    with begun(tmp_path / "d", size=1) as job:
        assert job.finished is None
        shard(job, "train-00000.tar")
        job.finish({"splits": {}})
    names = {p.name for p in (tmp_path / "d").iterdir()}
    assert names == {"train-00000.tar", PLAN, "meta.json"}
    with begun(tmp_path / "d", size=1) as job:
        assert job.finished == {"format": "smalto-images", "version": 1, "splits": {}}


def test_a_finished_folder_can_be_reused_without_writing(tmp_path):
    with begun(tmp_path, size=1) as job:
        job.finish({"splits": {}})
    before = sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir())
    with begun(tmp_path, size=1):
        pass
    assert sorted((p.name, p.stat().st_mtime_ns) for p in tmp_path.iterdir()) == before


def test_an_interrupted_job_knows_what_it_finished(tmp_path):
    with begun(tmp_path, size=1) as job:
        for number in range(3):
            shard(job, f"train-0000{number}.tar")
        (tmp_path / "train-00003.tar.tmp").write_bytes(b"half")
    (tmp_path / "train-00001.tar").write_bytes(b"damaged")
    with (tmp_path / DONE).open("a") as file:
        file.write('{"name": "train-00003.tar", "by')  # killed while writing
    with begun(tmp_path, size=1) as job:
        assert set(job.done) == {"train-00000.tar", "train-00002.tar"}
        assert not list(tmp_path.glob("*.tmp"))
        shard(job, "train-00001.tar")
    with begun(tmp_path, size=1) as job:
        assert set(job.done) == {f"train-0000{n}.tar" for n in range(3)}


@pytest.mark.parametrize("finish", [False, True])
def test_other_settings_are_refused_by_name(tmp_path, finish):
    with begun(tmp_path, size=1, kept="same") as job:
        shard(job, "train-00000.tar")
        if finish:
            job.finish({"splits": {}})
    with (
        pytest.raises(FileExistsError, match=r"size: 1 there, 2 now\).*overwrite=true"),
        begun(tmp_path, size=2, kept="same"),
    ):
        pass


def test_one_path_written_in_two_ways_is_no_other_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "others").mkdir()
    with begun("d", source={"path": "pictures", "classes": None}) as job:
        shard(job, "train-00000.tar")
    for same in ("pictures/", str(tmp_path / "pictures"), "./others/../pictures"):
        with begun(tmp_path / "d", source={"path": same, "classes": None}) as job:
            assert list(job.done) == ["train-00000.tar"]
    with pytest.raises(FileExistsError, match=r"\(source.path: .*pictures there, others now\)"):
        folder("d", source={"path": "others", "classes": None}).__enter__()


def test_overwrite_removes_ours_and_nothing_else(tmp_path):
    with begun(tmp_path, size=1) as job:
        shard(job, "train-00000.tar")
        job.finish({"splits": {}})
    (tmp_path / "notes.txt").write_text("mine")
    with begun(tmp_path, size=2, overwrite=True) as job:
        assert job.finished is None
        assert {p.name for p in tmp_path.iterdir()} == {"notes.txt", PLAN, LOCK}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_others_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(FileExistsError, match=r"thesis.txt"), folder(tmp_path, overwrite=overwrite, size=1):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="is a file"), folder(tmp_path / "thesis.txt", size=1):
        pass


def test_a_changed_source_is_refused(tmp_path):
    with begun(tmp_path, size=1, listing={"records": 5}) as job:
        shard(job, "train-00000.tar")
    with begun(tmp_path, size=1, listing={"records": 5}) as job:
        assert len(job.done) == 1
    with pytest.raises(FileExistsError, match="the source now gives"), begun(tmp_path, size=1, listing={"records": 6}):
        pass


def test_a_second_process_is_refused_and_a_stale_lock_taken_over(tmp_path):
    code = (
        "import sys, time; from smalto.data.output import OutputFolder\n"
        f"job = OutputFolder({str(tmp_path)!r}, format='smalto-images', settings=dict(size=1), command='c',"
        " overwrite=False)\n"
        "with job: job.begin(); print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "in\n"
            with (
                pytest.raises(FileExistsError, match=rf"in use by process {other.pid} on "),
                folder(tmp_path, size=1),
            ):
                pass
        finally:
            other.kill()
    assert (tmp_path / LOCK).exists()
    with begun(tmp_path, size=1) as job:
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()
        assert job.finished is None
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only")]
)
def test_a_full_disk_is_one_message_and_keeps_what_is_finished(tmp_path, number, words):
    def work():
        with begun(tmp_path, size=1) as job:
            shard(job, "train-00000.tar")
            raise OSError(number, os.strerror(number), "train-00001.tar.tmp")

    with pytest.raises(OSError, match=rf"{words}: train-00001.tar.tmp; finished shards stay") as caught:
        work()
    assert "Errno" not in str(caught.value)
    with begun(tmp_path, size=1) as job:
        assert set(job.done) == {"train-00000.tar"}


def test_plan_is_readable(tmp_path):
    with begun(tmp_path, size=(1, 2)):
        assert json.loads((tmp_path / PLAN).read_text())["settings"] == {"size": [1, 2]}
    with begun(tmp_path, size=(1, 2)):
        pass


@pytest.mark.parametrize("workers", [0, 2])
def test_pool_keeps_the_order_and_takes_little_ahead(workers):
    drawn = []

    def items():
        for number in range(-50, 0):
            drawn.append(number)
            yield number

    results = ordered_map(abs, items(), workers=workers)
    assert next(results) == 50
    assert len(drawn) <= 2 * workers + 1
    assert list(results) == list(range(49, 0, -1))


def test_workers_end_with_a_killed_parent():
    program = (
        "import multiprocessing, time\n"
        "from smalto.data.pool import ordered_map\n"
        "if __name__ == '__main__':\n"
        "    pids = ordered_map(eval, iter(['__import__(\"os\").getpid()'] * 9), workers=1)\n"
        "    print(next(pids), flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("read", ["", "images", "train-*.tar"])
def test_what_a_job_reads_is_never_taken_for_its_result(tmp_path, read):
    with begun(tmp_path, size=1) as job:
        shard(job, "train-00000.tar")
        job.finish({"splits": {}})
    job = OutputFolder(
        tmp_path / "x/..", format="smalto-codes", settings={}, command="c", overwrite=True, reads=[tmp_path / read]
    )
    with pytest.raises(FileExistsError, match="is where c reads from"):
        job.__enter__()
    assert (tmp_path / "train-00000.tar").exists()
