import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from smalto.data.encode import EncodeChunk, Item, Recipe, encode
from smalto.data.shards import IMAGES, read_meta
from smalto.data.source_idx import FashionMnist
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder, Record, Source
from smalto.data.splits import plan_splits
from smalto.prepare import prepare_images, run
from smalto.runtime import compose


class Squares(Source):
    """Images whose pixels say their number; some of them damaged."""

    def __init__(self, count=40, bad=(), classes=("even", "odd"), splits=None, labels=True, size=8):
        self.classes = list(classes)
        self._count, self._bad, self._splits = count, set(bad), splits
        self._labels, self._size = labels, size

    def __len__(self):
        return self._count

    def name(self, index):
        return f"square {index}"

    def split(self, index):
        return None if self._splits is None else self._splits[index % len(self._splits)]

    def __getitem__(self, index):
        buffer = io.BytesIO()
        Image.new("RGB", (self._size, self._size), (index, 2 * index, 0)).save(buffer, "PNG")
        return Record(
            image=b"damaged" if index in self._bad else buffer.getvalue(),
            name=self.name(index),
            label=index % 2 if self._labels else None,
            caption=f"number {index}" if self._labels else None,
            split=self.split(index),
        )


def prepare(source, out, **changes):
    options = {
        "recipe": Recipe("keep", None, "png", 3),
        "split": "auto",
        "val_fraction": 0.2,
        "limit": None,
        "shuffle": True,
        "seed": 0,
        "shard_size": 7,
        "workers": 0,
        "max_rejected": 0,
        "overwrite": False,
        "description": {"name": "squares"},
        "command": "smalto prepare",
    }
    return prepare_images(source, out=out, **(options | changes))


def contents(out):
    """Image number, label, caption and split of everything stored, by key."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            number = Image.open(io.BytesIO(sample["png"])).getpixel((0, 0))[0]
            split = shard.name.split("-")[0]
            found[split, sample["__key__"]] = (number, int(sample["cls"]), sample["txt"].decode())
    return found


def digests(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.tar")}


def test_webdataset_reads_every_image_once_with_its_label_and_caption(tmp_path):
    summary = prepare(Squares(), tmp_path / "d")
    stored = contents(tmp_path / "d")
    assert sorted(number for number, _, _ in stored.values()) == list(range(40))
    assert all(label == n % 2 and caption == f"number {n}" for n, label, caption in stored.values())
    assert summary["status"] == "written"
    assert summary["num_train"] + summary["num_val"] == 40


def test_meta_describes_the_shards(tmp_path):
    summary = prepare(Squares(), tmp_path)
    meta = read_meta(tmp_path, IMAGES)
    assert meta["num_classes"] == 2
    assert meta["classes"] == ["even", "odd"]
    assert meta["captions"] is True
    assert meta["image_size"] == [8, 8]
    assert meta["encoding"] == "png"
    assert meta["rejected"] == 0
    for name, count in (("train", summary["num_train"]), ("val", summary["num_val"])):
        shards = meta["splits"][name]["shards"]
        assert meta["splits"][name]["num_images"] == sum(s["num_images"] for s in shards) == count
        assert {s["sha256"] for s in shards} == {digests(tmp_path)[s["name"]] for s in shards}
        assert all(s["num_images"] == 7 for s in shards[:-1])


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    for workers in (0, 2):
        prepare(FashionMnist(), tmp_path / str(workers), workers=workers, limit=300, shard_size=100)
    assert digests(tmp_path / "0") == digests(tmp_path / "2")


def test_shuffled_shards_mix_the_classes(tmp_path):
    in_order = Squares(classes=())
    prepare(in_order, tmp_path / "mixed")
    prepare(in_order, tmp_path / "plain", shuffle=False)
    plain = [n for (split, _), (n, _, _) in contents(tmp_path / "plain").items() if split == "train"]
    mixed = [n for (split, _), (n, _, _) in contents(tmp_path / "mixed").items() if split == "train"]
    assert plain == sorted(plain)
    assert mixed != sorted(mixed)
    assert sorted(mixed) == plain  # the split is by name, not by place


def test_the_drawn_split_has_its_size_and_stays_when_the_source_grows():
    def val(count):
        source = Squares(count)
        return {source.name(i) for i in plan_splits(source, "auto", 0.1, None, None)["val"]}

    assert abs(len(val(5000)) - 500) < 5 * (5000 * 0.1 * 0.9) ** 0.5
    assert val(2000) <= val(5000)
    assert plan_splits(Squares(30), "hash", 0.0, None, None).keys() == {"train"}


def test_a_sources_own_split_is_taken():
    own = plan_splits(Squares(splits=["train", "train", "test"]), "auto", 0.5, None, None)
    assert all(i % 3 < 2 for i in own["train"])
    assert all(i % 3 == 2 for i in own["val"])
    three = plan_splits(Squares(splits=["train", "test", "validation"]), "source", 0.5, None, None)
    assert all(i % 3 == 2 for i in three["val"])  # with a val there, test stays out
    assert sum(map(len, three.values())) < 40
    drawn = plan_splits(Squares(splits=["train"]), "hash", 0.5, None, None)
    assert "val" in drawn
    with pytest.raises(ValueError, match="square 1 belongs to no split"):
        plan_splits(Squares(splits=["train", None]), "source", 0.5, None, None)


def test_limit_takes_the_first_of_the_order(tmp_path):
    summary = prepare(Squares(), tmp_path, limit=10)
    assert summary["num_train"] + summary["num_val"] == 10


def test_damaged_images_are_counted_and_named(tmp_path):
    with pytest.raises(ValueError, match=r"2 images could not be used, max_rejected is 1.*rejected.jsonl"):
        prepare(Squares(bad=[3, 11]), tmp_path, max_rejected=1)
    summary = prepare(Squares(bad=[3, 11]), tmp_path, max_rejected=2)
    assert summary["rejected"] == 2
    assert summary["num_train"] + summary["num_val"] == 38
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert {line["name"] for line in lines} == {"square 3", "square 11"}
    assert all("not a readable picture" in line["reason"] for line in lines)
    assert sorted(n for n, _, _ in contents(tmp_path).values()) == [n for n in range(40) if n not in (3, 11)]


def test_nothing_usable_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no image of the source could be used"):
        prepare(Squares(3, bad=[0, 1, 2]), tmp_path, max_rejected=9)
    assert not (tmp_path / "meta.json").exists()
    assert (tmp_path / "rejected.jsonl").exists()
    assert prepare(Squares(3), tmp_path, max_rejected=9, seed=5)["num_train"], "what left nothing is in nobody's way"


def test_labels_outside_the_classes_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"label is 1 but the source names 1 classes"):
        prepare(Squares(classes=["even"]), tmp_path)


def test_without_labels_there_are_no_classes(tmp_path):
    prepare(Squares(labels=False), tmp_path)
    meta = read_meta(tmp_path, IMAGES)
    assert meta["num_classes"] is None
    assert meta["captions"] is False


def test_running_again_reuses_and_overwrite_does_not(tmp_path):
    prepare(Squares(), tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")}
    assert prepare(Squares(), tmp_path)["status"] == "reused"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.tar")} == stamps
    with pytest.raises(FileExistsError, match="shard_size: 7 there, 9 now"):
        prepare(Squares(), tmp_path, shard_size=9)
    before = digests(tmp_path)
    assert prepare(Squares(), tmp_path, overwrite=True)["status"] == "written"
    assert digests(tmp_path) == before


class StopsAfter(Squares):
    """Kills the job in the middle."""

    def __getitem__(self, index):
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads > 25:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_an_interrupted_job_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("smalto.data.image_writer.CHUNK", 1)
    prepare(Squares(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prepare(StopsAfter(), tmp_path / "cut")
    kept = digests(tmp_path / "cut")
    assert len(kept) == 3  # 25 images read, 7 in a shard
    assert not (tmp_path / "cut" / "meta.json").exists()
    again = Squares()
    reads = []
    monkeypatch.setattr(again.__class__, "__getitem__", _counting(Squares.__getitem__, reads))
    prepare(again, tmp_path / "cut")
    assert len(reads) == 40 - 21
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert read_meta(tmp_path / "cut", IMAGES) == read_meta(tmp_path / "whole", IMAGES)


def _counting(function, calls):
    def wrapped(self, index):
        calls.append(index)
        return function(self, index)

    return wrapped


def test_a_changed_source_is_not_mixed_in(tmp_path, monkeypatch):
    monkeypatch.setattr("smalto.data.image_writer.CHUNK", 1)
    with pytest.raises(KeyboardInterrupt):
        prepare(StopsAfter(), tmp_path)
    with pytest.raises(FileExistsError, match="the source now gives"):
        prepare(Squares(41), tmp_path)


def test_a_killed_process_with_workers_goes_on(tmp_path):
    prepare(FashionMnist(), tmp_path / "whole", shard_size=100, limit=2500)
    code = (
        "from test_prepare import *\n"
        "if __name__ == '__main__':\n"
        "    import pathlib\n"
        f"    prepare(FashionMnist(), pathlib.Path({str(tmp_path / 'cut')!r}), shard_size=100, limit=2500, workers=2)"
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True) as job:
        while not (tmp_path / "cut" / "train-00001.tar").exists() and job.poll() is None:
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
    assert not (tmp_path / "cut" / "meta.json").exists()
    prepare(FashionMnist(), tmp_path / "cut", shard_size=100, limit=2500)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert not (tmp_path / "cut" / ".lock").exists()


@pytest.mark.parametrize(
    ("recipe", "size"),
    [
        (Recipe("center_crop", 10, "png", 3), (10, 10)),
        (Recipe("short_side", 10, "webp", 0), (10, 20)),
        (Recipe("pad", 50, "png", 0), (50, 50)),
        (Recipe("keep", None, "jpg", 90), (20, 40)),
    ],
)
def test_recipes(recipe, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    result = encode(Item("0", "n", Record(image=image, name="n")), recipe)
    assert result.size == size
    stored = Image.open(io.BytesIO(result.data))
    assert (stored.height, stored.width) == size
    assert stored.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[recipe.encoding]


@pytest.mark.parametrize(("encoding", "quality"), [("png", 0), ("png", -1), ("png", 9), ("webp", 0)])
def test_lossless_encodings_are(encoding, quality):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    result = encode(
        Item("0", "n", Record(image=Image.fromarray(pixels), name="n")), Recipe("keep", None, encoding, quality)
    )
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(result.data)).convert("RGB")), pixels)


def test_files_in_the_stored_form_are_kept_as_they_are():
    def jpeg(mode, **options):
        buffer = io.BytesIO()
        Image.new(mode, (20, 10), 77).save(buffer, "JPEG", **options)
        return buffer.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    recipe = Recipe("keep", None, "jpg", 95)
    plain, grey, rotated = jpeg("RGB"), jpeg("L"), jpeg("RGB", exif=turned)
    results = [encode(Item("0", "n", Record(image=data, name="n")), recipe) for data in (plain, grey, rotated)]
    assert results[0].data == plain
    assert [Image.open(io.BytesIO(r.data)).mode for r in results] == ["RGB"] * 3
    assert results[2].size == (20, 10)
    assert EncodeChunk(recipe)([Item("0", "n", Record(image=plain[:-30], name="n"))])[0].data is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("shrink", 8, "png", 3), "resize is 'shrink'"),
        (("keep", 8, "png", 3), "image_size is 8 but resize=keep"),
        (("pad", None, "png", 3), "resize=pad needs image_size"),
        (("keep", None, "bmp", 3), "encoding is 'bmp'"),
        (("keep", None, "png", 95), r"quality is 95, must be in -1\.\.9"),
    ],
)
def test_wrong_recipes_are_explained(arguments, words):
    with pytest.raises(ValueError, match=words):
        Recipe(*arguments)


def test_all_wrong_settings_are_told_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"split .*val_fraction .*limit .*shard_size .*workers .*max_rejected "):
        prepare(Squares(), tmp_path, split="some", val_fraction=1, limit=0, shard_size=0, workers=-1, max_rejected=-1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_job_that_could_not_begin_refuses_no_other_and_loses_nothing(tmp_path, overwrite):
    if overwrite:
        prepare(Squares(), tmp_path / "d")
    was = digests(tmp_path / "d")
    with pytest.raises(ValueError, match="belongs to no split"):
        prepare(Squares(), tmp_path / "d", split="source", overwrite=overwrite)
    assert (tmp_path / "d").exists() is overwrite
    assert digests(tmp_path / "d") == was
    with pytest.raises(ValueError, match="max_rejected is 0"):  # known only on the way, but before a shard is there
        prepare(Squares(bad=[0, 1, 2]), tmp_path / "d", shuffle=False, overwrite=overwrite)
    assert prepare(Squares(bad=[0]), tmp_path / "d", limit=20, max_rejected=1)["num_train"] > 10


def test_command_with_its_config(tmp_path):
    out = tmp_path / "fashion"
    overrides = [
        f"out={out}",
        "resize=pad",
        "image_size=32",
        "limit=50",
        "workers=0",
        "val_fraction=0.5",
        "mlflow=false",
    ]
    summary = run(compose("prepare", overrides))
    assert summary["num_train"] + summary["num_val"] == 50
    meta = read_meta(out, IMAGES)
    assert meta["image_size"] == [32, 32]
    assert meta["classes"][9] == "Ankle boot"
    assert meta["source"]["subset"] == "t10k"
    again = prepare(Tar(path=out), tmp_path / "again", shard_size=50)
    assert (again["num_train"], again["num_val"]) == (summary["num_train"], summary["num_val"])


@pytest.mark.parametrize("name", ["fashion_mnist", "idx", "folder", "parquet", "cifar10", "tar"])
def test_every_source_has_a_config_that_lists_all_arguments(name):
    import inspect

    from hydra.utils import get_class

    node = compose("prepare", [f"source={name}", "out=x"]).source
    arguments = set(inspect.signature(get_class(node["_target_"]).__init__).parameters) - {"self"}
    assert set(node) - {"_target_"} == arguments


def test_folder_end_to_end(tmp_path):
    for name in ("train/ant/1.png", "train/bee/2.png", "val/ant/3.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 5)).save(path)
    assert prepare(Folder(path=tmp_path / "in"), tmp_path / "out")["num_val"] == 1
    with tarfile.open(tmp_path / "out" / "train-00000.tar") as tar:
        assert sorted(tar.getnames()) == ["00000000.cls", "00000000.png", "00000001.cls", "00000001.png"]
