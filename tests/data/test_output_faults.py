"""An output folder whose job is killed, or whose disk fills, at every step it takes on the file system.

Whatever the step: the next command gives exactly its own results or is refused in one message, the same command with
overwrite=true gives exactly its own, and files of others stay.
"""

import builtins
import errno
import io
import itertools
import os
import re
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch

from smalto.data.output import OutputFolder
from smalto.data.output_plan import DONE, LOCK, PARTS, PICTURES, PLAN, SAMPLES
from smalto.data.shards import CODES, IMAGES, META
from smalto.data.write import TarShard
from smalto.errors import UserError
from smalto.files import write_bytes
from smalto.sampling.writer import PictureFolder, pack_npz

REMOVING = ("unlink", "rmdir")


def pictures(folder, seed, count):
    files = PictureFolder(folder.path / PICTURES)
    for i in files.missing(range(count)):
        files.write([i], torch.full((1, 3, 2, 2), 10 * seed + i, dtype=torch.uint8))
    pack_npz(files, count, folder.path / "samples.npz", labels=np.arange(count))
    files.sync(range(count))


def shards(folder, seed, count):
    for i in range(count):
        if f"train-{i:05d}.tar" not in folder.done:
            with TarShard(folder.path / f"train-{i:05d}.tar") as tar:
                tar.add("0.cls", bytes([10 * seed + i]))
                folder.record(tar.close())


def blocks(folder, seed, count):
    (folder.path / PARTS).mkdir(exist_ok=True)
    for i in range(count):
        part = folder.path / PARTS / f"train-{i:06d}.npy"
        if f"train-{i:05d}.tar" in folder.done:
            continue
        if not part.exists():
            write_bytes(part, bytes([10 * seed + i]))
        with TarShard(folder.path / f"train-{i:05d}.tar") as tar:
            tar.add("0.npy", part.read_bytes())
            folder.record(tar.close())
        part.unlink()


WORK = {SAMPLES: pictures, IMAGES: shards, CODES: blocks}


def run(path, kind, *, seed, count, overwrite=False, half=False):
    """A job of ``count`` results that ``seed`` decides; half done it is interrupted."""
    settings = {"seed": seed, "num_images": count}
    with OutputFolder(path, format=kind, settings=settings, command="smalto make", overwrite=overwrite) as folder:
        if folder.finished is None:
            folder.begin({"seed": seed})
            WORK[kind](folder, seed, count if not half else count - 1)
            if not half:
                folder.finish({"seed": seed, "splits": {"train": {"shards": list(folder.done.values())}}})


def content(path):
    """Every file; what is inside an .npz, whose bytes hold the time.

    Not what a job leaves beside finished data when it is killed: a free lock, lines and blocks of its shards, a plan
    half written.
    """
    files = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for name in list(files) if META in files else []:
        ours = rf"{LOCK}|{DONE}|{PARTS}/train-\d{{6}}.npy|{PLAN}.\w{{8}}.tmp"
        if re.fullmatch(ours, name) and files[name] != b"mine":
            del files[name]
    if "samples.npz" in files:
        with np.load(path / "samples.npz") as archive:
            files["samples.npz"] = {name: archive[name].tolist() for name in archive.files}
    return files


class Killed(BaseException):
    """What no code of ours catches."""


class Fault:
    """From the file system's call number ``at`` on nothing works: the process is gone, or the disk is full."""

    def __init__(self, at, how, patch):
        self.left, self.how, self.descriptors = at, how, []
        for name in ("unlink", "rmdir", "replace", "mkdir", "open"):
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        patch.setattr(os, "fsync", lambda descriptor: self.step("fsync"))
        patch.setattr(io, "open", self.wrapped("write", io.open))
        patch.setattr(builtins, "open", io.open)

    def wrapped(self, name, real):
        def call(path, *args, **options):
            mode = args[0] if args else options.get("mode", "r")
            if name == "write" and mode.startswith("r"):
                return real(path, *args, **options)
            self.step(name)
            if self.how == "kill" and self.left == 1 and name == "write":
                real(path, *args, **options).close()  # made, and nothing in it
                self.step(name)
            result = real(path, *args, **options)
            self.descriptors += [result] if name == "open" else []
            return result

        return call

    def step(self, name):
        self.left -= 1
        if self.left <= 0 and self.how == "kill":
            raise Killed
        if self.left <= 0 and name not in REMOVING:
            raise OSError(errno.ENOSPC, "No space left on device")


def ends(how, at, *args, **options):
    """How ``run`` ends: ``well``, or by which fault."""
    with pytest.MonkeyPatch.context() as patch:
        fault = Fault(at, how, patch)
        try:
            run(*args, **options)
            return "well"
        except Killed:
            return "kill"
        except UserError:
            return "full"
        finally:
            for descriptor in fault.descriptors:  # the system closes them, and with them goes the lock
                with suppress(OSError):
                    os.close(descriptor)


OLD, NEW = {"seed": 1, "count": 3}, {"seed": 2, "count": 1}
FOREIGN = {"notes.txt": b"words", f"{PICTURES}/mine.png": b"mine", f"{PARTS}/mine.npy": b"mine"}


def before(path, kind, state):
    """The folder that the job comes to."""
    if state == "new":
        return
    run(path, kind, **OLD, half=state == "begun")
    for name, data in FOREIGN.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(data)


CASES = list(itertools.product([SAMPLES, IMAGES, CODES], ["new", "begun", "finished"], ["kill", "full"]))
QUICK = [
    (SAMPLES, "begun", "kill"),
    (SAMPLES, "finished", "full"),
    (IMAGES, "finished", "kill"),
    (CODES, "new", "full"),
]


@pytest.mark.parametrize(
    ("kind", "state", "how"), [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_a_fault_at_any_step_leaves_no_mixture_and_no_dead_end(tmp_path, monkeypatch, kind, state, how):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    foreign = {} if state == "new" else FOREIGN
    expected = {}
    for number, job in enumerate((OLD, NEW)):
        run(tmp_path / f"alone{number}", kind, **job)
        expected[job["seed"]] = content(tmp_path / f"alone{number}") | foreign
    before(tmp_path / "base", kind, state) if state != "new" else (tmp_path / "base").mkdir()
    overwrite = state != "new"
    at, end = 0, ""
    while end != "well":
        at += 1
        fault = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "base", fault)
        end = ends(how, at, fault, kind, **NEW, overwrite=overwrite)
        assert end in (how, "well")
        for follower in (OLD, NEW):
            path = tmp_path / f"{at}-{follower['seed']}"
            shutil.copytree(fault, path)
            refused = ""
            try:
                run(path, kind, **follower)
            except UserError as error:
                refused = str(error)
            if refused:
                assert follower is OLD or state != "new", f"the same command goes on after a fault at {at}: {refused}"
                assert foreign.items() <= content(path).items()
            else:
                assert content(path) == expected[follower["seed"]]
            run(path, kind, **NEW, overwrite=True)
            assert content(path) == expected[NEW["seed"]]
    assert at > 10


# --- whose files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        '{"name": "plan of a house"}',
        "[]",
        "not json",
        "",
        "[" * 100_000,
        '{"format": "smalto-images"}',
        '{"format": "other", "settings": {}}',
        '{"format": "smalto-images", "settings": {}, "version": 2}',
        '{"format": "smalto-samples", "settings": {"num_images": "9"}}',
    ],
)
def test_somebody_elses_plan_is_refused_and_nothing_goes(tmp_path, plan, overwrite):
    names = ("train-00000.tar", "rejected.jsonl", "a.tmp", LOCK, META, f"{PARTS}/a", f"{PICTURES}/000000.png")
    for name, text in (dict.fromkeys(names, "mine") | {PLAN: plan}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    was = content(tmp_path)
    for kind in WORK:
        with pytest.raises(FileExistsError, match=r"plan.json (was not written by smalto|is of version 2)"):
            run(tmp_path, kind, **NEW, overwrite=overwrite)
    assert content(tmp_path) == was


def test_somebody_elses_lock_is_not_taken(tmp_path):
    (tmp_path / LOCK).write_text("mine")
    with pytest.raises(FileExistsError, match=r"did not write \(.lock\)"):
        run(tmp_path, IMAGES, **NEW)
    assert (tmp_path / LOCK).read_text() == "mine"


@pytest.mark.parametrize("kind", [SAMPLES, IMAGES, CODES])
def test_overwriting_leaves_all_that_the_plan_does_not_name(tmp_path, kind):
    run(tmp_path, kind, **OLD, half=True)
    mine = {"a.tmp", "train-000000.tar", "train-1.tar", "val-00000.tar.bak", f"{PICTURES}/1.png", f"{PICTURES}/x.png"}
    mine |= {f"{PICTURES}/000003.png", f"{PARTS}/train-0.npy", "sheet.jpg", "images.zip", f"{PARTS}/x/y", "done.json"}
    if kind == IMAGES:
        mine |= {f"{PICTURES}/000000.png", f"{PARTS}/train-000000.npy", "samples.npz"}
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    (tmp_path / f"{PLAN}.0123abcd.tmp").write_text("ours")
    run(tmp_path, kind, **NEW, overwrite=True)
    run(tmp_path / "alone", kind, **NEW)
    alone = content(tmp_path / "alone")
    shutil.rmtree(tmp_path / "alone")
    if kind == IMAGES:  # PIL is not asked what our words are
        (tmp_path / "samples.npz").unlink()
        mine.remove("samples.npz")
    assert content(tmp_path) == alone | dict.fromkeys(mine, b"mine")


def test_results_that_others_put_there_are_not_taken_for_ours(tmp_path):
    run(tmp_path, SAMPLES, seed=1, count=2)
    (tmp_path / PICTURES / "000003.png").write_bytes((tmp_path / PICTURES / "000000.png").read_bytes())
    with pytest.raises(FileExistsError, match=r"did not write \(images/000003.png\)"):
        run(tmp_path, SAMPLES, seed=2, count=4, overwrite=True)
    assert (tmp_path / META).exists(), "refused before anything went"


@pytest.mark.parametrize(("kind", "name"), [(SAMPLES, PICTURES), (CODES, PARTS), (IMAGES, DONE), (IMAGES, PLAN)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_links_are_not_followed(tmp_path, kind, name, overwrite):
    run(tmp_path / "d", kind, **OLD, half=True)
    shutil.rmtree(tmp_path / "d" / name) if name in (PICTURES, PARTS) else None
    target = tmp_path / "else"
    if name in (PICTURES, PARTS):
        target.mkdir()
        (target / "000000.png").write_bytes(b"mine")
        (target / "train-000000.npy").write_bytes(b"mine")
    else:
        shutil.move(tmp_path / "d" / name, target)
    (tmp_path / "d" / name).symlink_to(target)
    was = content(target) if target.is_dir() else target.read_bytes()
    with pytest.raises(FileExistsError, match=rf"{name} is a link"):
        run(tmp_path / "d", kind, **(NEW if overwrite else OLD), overwrite=overwrite)
    assert (content(target) if target.is_dir() else target.read_bytes()) == was


# --- what is there before, and what is checked before ------------------------------------------------


@pytest.mark.parametrize("name", [f"{PLAN}.tmp", f"{PLAN}.0123abcd.tmp"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_plan_that_was_being_written_is_ours(tmp_path, name, overwrite):
    (tmp_path / name).write_bytes(b"")
    run(tmp_path, IMAGES, **NEW, overwrite=overwrite)
    assert name not in content(tmp_path)


@pytest.mark.parametrize("kind", [SAMPLES, IMAGES, CODES])
def test_temporary_files_of_all_versions_go_when_a_job_continues(tmp_path, kind):
    run(tmp_path, kind, **OLD, half=True)
    left = {SAMPLES: f"{PICTURES}/000002", IMAGES: "train-00002.tar", CODES: f"{PARTS}/train-000002.npy"}[kind]
    (tmp_path / left).parent.mkdir(exist_ok=True)
    old = {f"{left}.tmp", f"{PLAN}.tmp", f"{DONE}.tmp", f"{META}.tmp", f"{META}.01234567.tmp"}
    old.add(f"{left}{'.png' if kind == SAMPLES else ''}.89abcdef.tmp")
    for name in old:
        (tmp_path / name).write_bytes(b"half")
    run(tmp_path, kind, **OLD)
    run(tmp_path / "alone", kind, **OLD)
    assert content(tmp_path / "alone").keys() == {n for n in content(tmp_path) if not n.startswith("alone/")}


def refuse(path, *, seed, overwrite=False):
    settings = {"seed": seed, "num_images": 2}
    with OutputFolder(path, format=SAMPLES, settings=settings, command="smalto make", overwrite=overwrite):
        raise ValueError("a wrong label")


def test_a_refused_job_leaves_no_trace_and_no_loss(tmp_path):
    with pytest.raises(ValueError, match="label"):
        refuse(tmp_path / "a" / "b", seed=1)
    assert not list(tmp_path.iterdir())
    run(tmp_path / "d", SAMPLES, **OLD)
    was = content(tmp_path / "d")
    with pytest.raises(ValueError, match="label"):
        refuse(tmp_path / "d", seed=2, overwrite=True)
    assert content(tmp_path / "d") == was, "overwrite=true clears only what the new job can begin to replace"


def test_a_plan_without_a_result_blocks_nobody(tmp_path):
    for seed in (1, 2):  # older versions wrote the plan first
        settings = {"seed": seed, "num_images": 2}
        with OutputFolder(tmp_path, format=SAMPLES, settings=settings, command="c", overwrite=False) as folder:
            folder.begin({"records": seed})
    run(tmp_path, SAMPLES, **NEW)
    with pytest.raises(FileExistsError, match="seed: 2 there, 1 now"):
        run(tmp_path, SAMPLES, **OLD)


@pytest.mark.parametrize("damage", ["missing", "cut", "meta"])
def test_finished_data_that_is_no_longer_there_is_not_called_complete(tmp_path, damage):
    run(tmp_path, IMAGES, **NEW)
    file = tmp_path / (META if damage == "meta" else "train-00000.tar")
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(FileExistsError, match=rf"{file.name} (is missing|has 40 bytes|is damaged).*overwrite=true"):
        run(tmp_path, IMAGES, **NEW)
    run(tmp_path, IMAGES, **NEW, overwrite=True)
    run(tmp_path, IMAGES, **NEW)


def test_folders_of_older_versions_are_finished_or_go_on(tmp_path):
    """Their plans state no version."""
    settings = '{"seed": 1, "num_images": 3}'
    run(tmp_path, IMAGES, **OLD, half=True)
    (tmp_path / PLAN).write_text(f'{{"format": "{IMAGES}", "settings": {settings}}}')
    kept = (tmp_path / "train-00000.tar").stat().st_mtime_ns
    run(tmp_path, IMAGES, **OLD)
    (tmp_path / PLAN).write_text(f'{{"format": "{IMAGES}", "settings": {settings}, "listing": {{"seed": 1}}}}')
    run(tmp_path, IMAGES, **OLD)
    assert (tmp_path / "train-00000.tar").stat().st_mtime_ns == kept
    with pytest.raises(FileExistsError, match="holds finished data made with other settings"):
        run(tmp_path, IMAGES, **NEW)


def test_lines_of_finished_shards_are_data(tmp_path):
    """Neither a line that a power cut spoiled nor a name that leads elsewhere counts."""
    run(tmp_path / "d", IMAGES, **OLD, half=True)
    whole = (tmp_path / "d" / DONE).read_bytes()
    (tmp_path / "x.tar").write_bytes(b"12")
    wrong = b'\0\0\0\n[]\n{"name": "../x.tar", "bytes": 2}\n{"name": 3, "bytes": 2}\n'
    (tmp_path / "d" / DONE).write_bytes(wrong + whole)
    settings = {"seed": 1, "num_images": 3}
    with OutputFolder(tmp_path / "d", format=IMAGES, settings=settings, command="c", overwrite=False) as folder:
        folder.begin({"seed": 1})
        assert set(folder.done) == {"train-00000.tar", "train-00001.tar"}
    assert (tmp_path / "d" / DONE).read_bytes() == whole
