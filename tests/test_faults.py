"""What happens to data when disks, files and people misbehave: each fault has its outcome, nothing finished is lost."""

import io
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalto.data.encode import Recipe
from smalto.data.images import ImageShards
from smalto.data.shards import CODES, IMAGES, read_meta
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder
from test_extract import Stub, codes_of, extract, images  # noqa: F401
from test_prepare import Squares, digests, prepare


def outcome(job) -> str:
    """What ``job`` returned or raised, in a process of its own."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def work() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        try:
            queue.put(str(job()))
        except BaseException as error:
            queue.put(f"{type(error).__name__}: {error}")

    process = context.Process(target=work, daemon=True)
    process.start()
    result = queue.get(timeout=60)
    process.join()
    return result


def image_module(path, **changes):
    options = {"image_size": 8, "batch_size": 2, "augment": "none", "flip_prob": 0, "num_workers": 0, "seed": 0}
    data = ImageShards(path=path, cache_mb=0, **(options | changes))
    data.setup()
    return data


# --- damaged input ------------------------------------------------------------------------------------


def test_a_truncated_tar_stops_prepare_and_training_with_its_name(tmp_path):
    prepare(Squares(), tmp_path / "in")
    shard = tmp_path / "in" / "train-00001.tar"
    whole = shard.read_bytes()
    for size, how in ((560, "ends inside a member"), (1024, "ends without tar's end mark"), (1500, "ends ")):
        shard.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"train-00001.tar {how}"):
            prepare(Tar(path=tmp_path / "in"), tmp_path / "out")
        with pytest.raises(ValueError, match=rf"train-00001.tar has {size} bytes, meta.json says"):
            image_module(tmp_path / "in")


def test_a_corrupt_jpeg_is_left_out_named_and_counted(tmp_path):
    for number in range(12):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"{number:02d}.jpg")
    data = (tmp_path / "05.jpg").read_bytes()
    (tmp_path / "05.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "06.jpg").write_bytes(b"<html>404</html>")
    summary = prepare(Folder(path=tmp_path), tmp_path / "out", recipe=Recipe("keep", None, "jpg", 95), max_rejected=2)
    assert (summary["num_train"] + summary["num_val"], summary["rejected"]) == (10, 2)
    lines = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert sorted(line["name"] for line in lines) == ["05.jpg", "06.jpg"]


@pytest.mark.parametrize("fault", ["missing", "empty", "other size"])
def test_shards_that_are_not_what_they_were(images, tmp_path, fault):  # noqa: F811
    shutil.copytree(images, tmp_path / "images")
    extract(images, tmp_path / "codes", crops="center")
    for folder, kind, use in ((tmp_path / "images", IMAGES, image_module), (tmp_path / "codes", CODES, codes_of)):
        shard = folder / "val-00000.tar"
        if fault == "missing":
            shard.unlink()
            error, said = FileNotFoundError, r"val-00000.tar is listed in meta.json but missing; restore it"
        else:
            shard.write_bytes(b"" if fault == "empty" else shard.read_bytes() + bytes(512))
            error, said = ValueError, r"val-00000.tar has \d+ bytes, meta.json says \d+: copied incompletely"
        with pytest.raises(error, match=said):
            use(folder)
        with pytest.raises(error, match=said):
            read_meta(folder, kind)


def test_an_image_that_changed_inside_its_shard_is_named_when_it_is_read(tmp_path):
    prepare(Squares(), tmp_path)
    shard = tmp_path / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[512:560] = bytes(48)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"image 0 in .*train-00000.tar is damaged"):
        image_module(tmp_path).fetch_train(0, np.arange(3))


def foreign_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8)).save(buffer, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            tar.addfile(info, io.BytesIO(buffer.getvalue()))


def test_duplicate_keys_are_refused(tmp_path):
    foreign_tar(tmp_path / "train-0.tar", ["a.png", "b.png", "a.png"])
    with pytest.raises(ValueError, match=r"train-0.tar holds a.png twice"):
        prepare(Tar(path=tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match=r"two images with the key a"):
        image_module(tmp_path / "*.tar", augment="center_crop")
    foreign_tar(tmp_path / "train-1.tar", ["a.png"])
    (tmp_path / "train-0.tar").unlink()
    foreign_tar(tmp_path / "train-0.tar", ["a.png"])  # the same key in two shards is two images
    assert image_module(tmp_path / "*.tar", augment="center_crop").num_train == 2


def test_an_empty_foreign_shard_is_no_error_and_no_images(tmp_path):
    foreign_tar(tmp_path / "train-0.tar", [])
    foreign_tar(tmp_path / "train-1.tar", ["a.png", "b.png"])
    assert image_module(tmp_path / "*.tar", augment="center_crop").num_train == 2
    assert len(Tar(path=tmp_path)) == 2
    (tmp_path / "train-0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"train-0.tar is not a tar file: it has 0 bytes"):
        image_module(tmp_path / "*.tar", augment="center_crop")


# --- places that cannot be written --------------------------------------------------------------------


@pytest.fixture
def public_folder():
    """A folder that any user may look into, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def without_rights(folder: Path) -> None:
    """From here on this process may not write into ``folder``."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.setuid(65534)


def test_a_folder_without_the_right_to_write_is_said_before_any_work(public_folder):
    def job():
        without_rights(public_folder)
        return prepare(Unreadable(), public_folder / "out")

    text = outcome(job)
    assert text.startswith(f"StorageError: no permission to write: {public_folder}/out; ")
    assert list(public_folder.iterdir()) == []


class Unreadable(Squares):
    """Must not be read."""

    def __getitem__(self, index):
        raise AssertionError("read before the place was tried")


def test_finished_data_in_such_a_folder_is_used(public_folder):
    prepare(Squares(), public_folder / "out")

    def job():
        without_rights(public_folder / "out")
        return prepare(Squares(), public_folder / "out")["status"], image_module(public_folder / "out").num_train

    status, count = eval(outcome(job))
    assert status == "reused"
    assert count == read_meta(public_folder / "out", IMAGES)["splits"]["train"]["num_images"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 128 KiB where mounting is allowed; elsewhere a limit of 24 KiB a file, which fails at the same place.

    Yields the folder and a function that makes room.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    if mounted:
        yield disk, lambda: None, lambda: subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        subprocess.run(["umount", "-l", str(disk)], check=True)
    else:
        limit = (24 << 10, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        yield disk, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit), lambda: None


class Noise(Squares):
    """Images that do not compress: 48 x 48 are 7 KiB."""

    def __getitem__(self, index):
        record = super().__getitem__(index)
        pixels = np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        return type(record)(Image.fromarray(pixels), record.name, record.label, record.caption, record.split)


def test_a_full_disk_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, small_disk):
    disk, restrict, make_room = small_disk
    prepare(Noise(), tmp_path / "whole", shard_size=3)

    def job():
        restrict()
        return prepare(Noise(), disk / "out", shard_size=7)

    text = outcome(job)
    assert text.startswith(
        ("StorageError: the disk is full", "StorageError: a file would be larger than this process may write")
    )
    assert f"finished shards stay in {disk}/out" in text
    kept = digests(disk / "out")
    assert not (disk / "out" / "meta.json").exists()
    assert not list((disk / "out").glob("*.tmp"))
    make_room()
    assert prepare(Noise(), disk / "out", shard_size=7)["status"] == "written"
    assert kept.items() <= digests(disk / "out").items()
    prepare(Noise(), tmp_path / "sevens", shard_size=7)
    assert digests(disk / "out") == digests(tmp_path / "sevens")


def test_extraction_on_a_full_disk_goes_on_too(images, tmp_path, small_disk):  # noqa: F811
    disk, restrict, make_room = small_disk
    options = {"crop_range": [1.25, 1.5, 1.75, 1.9], "block_size": 20, "shard_size": 60}
    extract(images, tmp_path / "whole", Stub(codebook_size=70_000), **options)

    def job():
        restrict()
        return extract(images, disk / "out", Stub(codebook_size=70_000), **options)

    text = outcome(job)
    assert "finished shards stay" in text, text
    make_room()
    extract(images, disk / "out", Stub(codebook_size=70_000), **options)
    assert digests(disk / "out") == digests(tmp_path / "whole")


# --- people -------------------------------------------------------------------------------------------


class Slow(Squares):
    """Long enough for a second process to come."""

    def __getitem__(self, index):
        time.sleep(0.02)
        return super().__getitem__(index)


def test_two_processes_at_one_folder_one_works_one_is_told(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()

    def work() -> None:
        barrier.wait()
        try:
            queue.put(prepare(Slow(), tmp_path / "out")["status"])
        except FileExistsError as error:
            queue.put(str(error))

    jobs = [context.Process(target=work) for _ in range(2)]
    for job in jobs:
        job.start()
    results = sorted(queue.get(timeout=60) for _ in jobs)
    for job in jobs:
        job.join()
    assert results[1] == "written"
    assert "is in use by " in results[0]
    prepare(Squares(), tmp_path / "alone")
    assert digests(tmp_path / "out") == digests(tmp_path / "alone")


def test_names_with_spaces_brackets_and_any_letters(tmp_path):
    home = tmp_path / "Bilder für Łukasz [neu] {1,2} 図 = $HOME"
    for name in ("train/größe 1/ä b.png", "train/図/x=1, y.png", "val/図/[1].png", "val/größe 1/{a,b}.png"):
        (home / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (9, 9, 9)).save(home / "in" / name)
    (home / "in" / "val" / "図" / "kaputt ü.png").write_bytes(b"no")
    source = Folder(path=home / "in")
    assert source.classes == ["größe 1", "図"]
    recipe = Recipe("keep", None, "png", 1)
    summary = prepare(source, home / "out", recipe=recipe, max_rejected=1)
    assert (summary["num_train"], summary["num_val"], summary["rejected"]) == (2, 2, 1)
    assert json.loads((home / "out" / "rejected.jsonl").read_text())["name"] == "val/図/kaputt ü.png"
    assert image_module(home / "out", image_size=16).classes == ["größe 1", "図"]
    assert len(Tar(path=home / "out")) == 4
    extract(home / "out", home / "codes", crops="center")
    assert codes_of(home / "codes", batch_size=2).num_train == 2
    (home / "out" / "meta.json").unlink()
    (home / "out" / "plan.json").unlink()
    assert image_module(home / "out", image_size=16, augment="center_crop").num_val == 2
