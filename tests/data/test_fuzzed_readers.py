"""Every reader of files from outside, on thousands of damaged ones: refused in one line, or read; never more."""

import gzip
import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from fuzzing import mutations, survives
from smalto.data.encode import Item, Recipe, encode
from smalto.data.image_stream import ImageStream
from smalto.data.npz_images import open_npz_images, read_npz_statistics
from smalto.data.pictures import FORMATS
from smalto.data.reader import ImageReader
from smalto.data.source_cifar import Cifar10
from smalto.data.source_idx import Idx
from smalto.data.source_parquet import Parquet
from smalto.data.source_tar import Tar
from smalto.data.sources import Folder, Record, Source
from smalto.data.splits import listing, plan_splits
from smalto.data.tar_stream import read_samples
from smalto.data.transforms import center_crop
from smalto.errors import UserError

FAST, ALL = 40, 10_000
RECIPE = Recipe("center_crop", 16, "png", 1)


def picture(image_format: str = "PNG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (18, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    extra = {"exif": exif} if image_format in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    image.save(buffer, image_format, **extra, **options)
    return buffer.getvalue()


def use(source: Source) -> None:
    """What ``smalto prepare`` does with a source, without the shards: a record may be rejected, by one line."""
    splits = plan_splits(source, "auto", 0.5, None, np.random.default_rng(0))
    source.check(np.concatenate(list(splits.values())) if splits else [])
    listing(source, splits)
    assert isinstance(source.skipped, dict)
    for index in range(min(len(source), 20)):
        try:
            record = source[index]
        except (OSError, ValueError):
            continue
        if record.caption is not None:
            record.caption.encode()
        encode(Item("0", record.name, record), RECIPE)
    json.dumps(list(source.classes)[:100])


def read_picture(data: bytes) -> None:
    result = encode(Item("0", "x", Record(image=data, name="x")), Recipe("keep", None, "png", 1))
    assert (result.data is None) == bool(result.reason)
    if result.data is None:
        raise UserError(result.reason)


def tar(form: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for n in range(3):
            members = {"png": picture(), "cls": b"%d" % n, "txt": b"one", "json": b'{"label": 1, "caption": "a"}'}
            for kind, data in members.items():
                info = tarfile.TarInfo(f"{'d' * 60 * n}/{n}.{kind}")
                info.size = len(data)
                if form == tarfile.PAX_FORMAT:
                    info.pax_headers = {"comment": "a"}
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read_tar(path) -> None:
    meta = {"splits": {"train": {"shards": [{"name": str(path)}]}}, "encoding": None}
    for read in (lambda: use(Tar(path=path)), lambda: ImageReader(path.parent, meta, "train"), lambda: stream(path)):
        try:
            read()
        except UserError as error:
            refused = error
        else:
            refused = None
    if refused is not None:
        raise refused


def stream(path) -> None:
    for sample in read_samples(str(path)):
        assert sample
    images = ImageStream(
        urls=[str(path)],
        image_size=8,
        batch_size=1,
        crop=lambda image, size, rng: center_crop(image, size),
        flip_prob=0.0,
        buffer_size=2,
        seed=0,
        max_skipped=0.0,
        rank=0,
        world_size=1,
        num_classes=3,
    )
    batches = iter(images)
    for _ in range(3):
        next(batches)


def npz(save) -> bytes:
    buffer = io.BytesIO()
    statistics = {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    save(buffer, arr_0=np.zeros((4, 6, 6, 3), np.uint8), labels=np.arange(4), **statistics)
    return buffer.getvalue()


def read_npz(path) -> None:
    images, labels = open_npz_images(path)
    assert np.asarray(images).sum() >= 0
    assert labels is None or len(labels) == len(images)
    read_npz_statistics(path)


def jsonl() -> bytes:
    rows = [{"path": "a.png", "label": n, "caption": ["a", "b"], "split": s} for n, s in ((0, "train"), (1, "val"))]
    return "".join(json.dumps(row) + "\n" for row in rows * 3).encode()


CSV = b'\xef\xbb\xbfpath;label;caption;split\na.png;cat;"one; two";train\na.png;dog;"three\nfour";val\n' * 1
IDX = struct.pack(">HBB3I", 0, 8, 3, 4, 5, 5) + bytes(100)


def parquet() -> bytes:
    buffer = io.BytesIO()
    table = pa.table({"image": [picture()] * 6, "label": [0, 1, 2] * 2, "c": ["a"] * 6, "s": ["train", "val"] * 3})
    pq.write_table(table, buffer, row_group_size=3, compression="snappy")
    return buffer.getvalue()


def cifar() -> bytes:
    batch = {b"data": np.zeros((3, 3072), np.uint8), b"labels": [0, 1, 9]}
    return pickle.dumps(batch, protocol=2)


def cifar_folder(path) -> None:
    for n in range(1, 6):
        (path.parent / f"data_batch_{n}{path.suffix}").write_bytes(path.read_bytes())
    (path.parent / f"test_batch{path.suffix}").write_bytes(path.read_bytes())
    use(Cifar10(path=path.parent))


READERS = {
    "tar": (tar(tarfile.USTAR_FORMAT), "x-0.tar", read_tar),
    "tar gnu": (tar(tarfile.GNU_FORMAT), "x-0.tar", read_tar),
    "tar pax": (tar(tarfile.PAX_FORMAT), "x-0.tar", read_tar),
    "tar gz": (gzip.compress(tar(tarfile.GNU_FORMAT)), "x-0.tar.gz", stream),
    "npz": (npz(np.savez), "x.npz", read_npz),
    "npz packed": (npz(np.savez_compressed), "x.npz", read_npz),
    "jsonl": (jsonl(), "t.jsonl", lambda path: use(Folder(path=path.parent, metadata=path.name))),
    "csv": (CSV, "t.csv", lambda path: use(Folder(path=path.parent, metadata=path.name))),
    "idx": (IDX, "i", lambda path: use(Idx(images=path, labels=path.with_name("l")))),
    "idx packed": (gzip.compress(IDX), "i", lambda path: use(Idx(images=path, labels=path.with_name("l")))),
    "parquet": (
        parquet(),
        "x.parquet",
        lambda path: use(Parquet(path=path, caption_column="c", split_column="s")),
    ),
    "cifar": (cifar(), "x", cifar_folder),
    "cifar binary": (bytes(range(10)) + bytes(3 * 3073 - 10), "x.bin", cifar_folder),
}


def fuzz(tmp_path, kind: str, count: int) -> None:
    good, name, read = READERS[kind]
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "l").write_bytes(struct.pack(">HBBI", 0, 8, 1, 4) + bytes(4))
    path = tmp_path / name
    path.write_bytes(good)
    assert survives(read, path) is None
    refused = 0
    for data in mutations(good, count=count, seed=len(kind)):
        path.write_bytes(data)
        refused += survives(read, path) is not None
    assert refused, "no mutation did anything"


def fuzz_pictures(image_format: str, count: int) -> None:
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    good = picture(image_format)
    assert survives(read_picture, good) is None
    refused = sum(survives(read_picture, data) is not None for data in mutations(good, count=count, seed=1))
    assert refused, "no mutation did anything"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(tmp_path, kind):
    fuzz(tmp_path, kind, FAST)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_pictures(image_format):
    fuzz_pictures(image_format, FAST)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_ten_thousand_damaged_files(tmp_path, kind):
    fuzz(tmp_path, kind, ALL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", FORMATS)
def test_ten_thousand_damaged_pictures(image_format):
    fuzz_pictures(image_format, ALL)
