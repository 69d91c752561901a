"""Tars that other programs wrote, and damaged ones: no member is lost or renamed without a word, and none hangs."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from smalto.data.image_stream import ImageStream
from smalto.data.reader import ImageReader
from smalto.data.shards import read_member, tar_members
from smalto.data.source_tar import Tar
from smalto.data.tar_stream import read_samples
from smalto.data.transforms import center_crop


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def info(name: str, data: bytes = b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, data


def write(path, *members, form=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return path


def foreign(path):
    return {"splits": {"train": {"shards": [{"name": str(path)}]}}, "encoding": None}


def stream(path, **changes):
    options = {
        "urls": [str(path)],
        "image_size": 4,
        "batch_size": 1,
        "crop": lambda image, size, rng: center_crop(image, size),
        "flip_prob": 0.0,
        "buffer_size": 1,
        "seed": 0,
        "max_skipped": 0.0,
        "rank": 0,
        "world_size": 1,
    }
    return ImageStream(**(options | changes))


READERS = {
    "prepare": lambda path: [record.label for record in Tar(path=path)],
    "index": lambda path: ImageReader(path.parent, foreign(path), "train").labels.tolist(),
    "stream": lambda path: next(iter(stream(path)))["label"].tolist(),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_key_with_two_images_is_never_one_record(tmp_path, reader):
    members = [
        info(f"22.{n:02d}.{kind}", data) for n in range(3) for kind, data in (("png", png(n)), ("cls", b"%d" % n))
    ]
    path = write(tmp_path / "train-0.tar", *members)
    with pytest.raises(ValueError, match=r"3 images with the key 22 \(22.00.png, 22.01.png, 22.02.png\)"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_mask_beside_an_image_is_refused_not_taken_for_it(tmp_path, reader):
    path = write(tmp_path / "train-0.tar", info("k.mask.png", png(1)), info("k.image.png", png(2)))
    with pytest.raises(ValueError, match="2 images with the key k"):
        READERS[reader](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_label_goes_with_the_image_of_its_whole_name(tmp_path, reader):
    path = write(tmp_path / "train-0.tar", info("v1.003.png", png(1)), info("v1.003.cls", b"7"))
    assert READERS[reader](path) == [7]
    path = write(tmp_path / "train-1.tar", info("v1.003.png", png(1)), info("v1.004.cls", b"7"))
    with pytest.raises(ValueError, match=r"the label v1.004.cls, which belongs to no image"):
        READERS[reader](path)


def test_hidden_and_system_members_are_counted(tmp_path):
    path = write(
        tmp_path / "x.tar",
        *(info(f"./cat/{kind}{n}.png", png(n)) for n in range(3) for kind in ("", "._")),
        info("__MACOSX/cat/0.png", png(9)),
        info("cat/notes.txt", b"none"),
    )
    source = Tar(path=path)
    assert [source.name(i) for i in range(3)] == [f"x.tar/./cat/{n}" for n in range(3)]
    assert source.skipped == {"hidden or system": 4, "keys without an image": 1}
    assert [len(sample) for sample in read_samples(str(path))] == [1, 1, 1, 1]


LONG = "f/" + "n" * 150


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_long_name_of_a_folder_is_not_that_of_the_next_file(tmp_path, form):
    long = LONG if form != tarfile.USTAR_FORMAT else "p" * 100 + "/" + "n" * 90
    folder = info(long, type=tarfile.DIRTYPE)
    path = write(tmp_path / "x.tar", folder, info("a.png", png(1)), info(f"{long}.png", png(2)), form=form)
    found = {m.name: read_member(path, m) for m in tar_members(path)}
    assert found == {"a.png": png(1), f"{long}.png": png(2)}


def test_links_are_what_they_lead_to(tmp_path):
    path = write(
        tmp_path / "x.tar",
        info("d/a.png", png(1)),
        info("d/b.png", type=tarfile.LNKTYPE, linkname="d/a.png"),
        info("d/c.png", type=tarfile.SYMTYPE, linkname="b.png"),
        info("d/lost.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        info("pipe", type=tarfile.FIFOTYPE),
    )
    skipped: Counter[str] = Counter()
    found = {m.name: read_member(path, m) for m in tar_members(path, skipped)}
    assert found == {f"d/{name}.png": png(1) for name in "abc"}
    assert skipped == {"links to nothing in the tar": 1, "devices and sparse files": 1}


def test_sizes_in_extended_headers_count(tmp_path):
    members = [info("a.png", png(1), pax_headers={"comment": "x"}), info("b.png", png(2))]
    path = write(tmp_path / "x.tar", *members, form=tarfile.PAX_FORMAT)
    data = bytearray(path.read_bytes())
    record = b"19 comment=abcdefg\n"  # as long as the record that takes its place
    sized = b"%d size=%0*d\n" % (len(record), len(record) - 9, len(png(1)))
    assert len(sized) == len(record)
    with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in (info("a.png", png(1), pax_headers={"comment": "abcdefg"}), members[1]):
            tar.addfile(member, io.BytesIO(content))
    data = bytearray((tmp_path / "y.tar").read_bytes())
    place = data.index(record)
    data[place : place + len(record)] = sized
    header = (place // 512 + 1) * 512
    data[header + 124 : header + 136] = b"00000000000\0"  # the size is in the extended header alone
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    path.write_bytes(data)
    assert [(m.name, read_member(path, m)) for m in tar_members(path)] == [("a.png", png(1)), ("b.png", png(2))]


def with_size(path, field: bytes):
    """The first member claims another size, and the checksum is right."""
    data = bytearray(path.read_bytes())
    data[124:136] = field
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [-512, -1024, -(2**40), 2**62])
def test_sizes_that_lead_back_or_beyond_are_refused_at_once(tmp_path, reader, size):
    path = write(tmp_path / "train-0.tar", info("a.png", png(1)), info("b.png", png(2)))
    with_size(
        path,
        (b"\xff" if size < 0 else b"\x80") + b"\0" * 3 + struct.pack(">q", size)
        if size > 0
        else b"\xff" * 4 + struct.pack(">q", size),
    )
    began = time.process_time()
    with pytest.raises(ValueError, match="train-0"):
        READERS[reader](path)
    assert time.process_time() - began < 2


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path):
    path = write(tmp_path / "x.tar", *(info(f"{n}.png", png(n)) for n in range(4)))
    data = bytearray(path.read_bytes())
    data[data.index(b"2.png\0") + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a header is damaged"):
        list(tar_members(path))
    with pytest.raises(OSError, match="a header is damaged"):
        list(read_samples(str(path)))


def test_tars_older_than_the_standard(tmp_path):
    path = write(tmp_path / "x.tar", info("a.png", png(1)), info("b.png", png(2)))
    data = bytearray(path.read_bytes())
    for start in (0, 1024):
        data[start + 257 : start + 512] = bytes(255)  # no magic, no owner
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    assert [m.name for m in tar_members(path)] == ["a.png", "b.png"]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_small_file_does_not_unpack_without_end(tmp_path, pack):
    member = tarfile.TarInfo("a.bin")
    member.size = 400 * 2**20
    zeros = member.tobuf() + bytes(80 * 2**20)
    path = tmp_path / "x.tar.packed"
    path.write_bytes(pack(zeros) if pack is not gzip.compress else gzip.compress(zeros, 1))
    with pytest.raises(OSError, match=r"unpack to more than 200 times as many"):
        list(read_samples(str(path)))


def test_a_header_does_not_ask_for_memory(tmp_path):
    path = write(tmp_path / "x.tar", info("a" * 50_000 + ".png", png(1)))
    for read in (lambda: list(tar_members(path)), lambda: list(read_samples(str(path)))):
        with pytest.raises((ValueError, OSError), match="a header claims 50005 bytes"):
            read()


def test_words_and_damage_in_members_beside_images(tmp_path):
    path = write(
        tmp_path / "x.tar",
        *(info(f"{n}.png", png(n)) for n in range(4)),
        info("0.json", json.dumps({"label": "dog"}).encode()),
        info("1.json", b'["a list"]'),
        info("2.json", b"{"),
        info("3.cls", b"cat\n"),
        info("3.txt", "Gr\xfc\xdfe".encode("latin1")),
    )
    source = Tar(path=path)
    assert source.classes == ["cat", "dog"]
    assert source[0].label == 1
    for index, reason in ((1, "no JSON object"), (2, "is not JSON"), (3, "3.txt is not UTF-8")):
        with pytest.raises(ValueError, match=reason):
            source[index]
    source.check()  # records that will be rejected keep no other from its label


def test_labels_of_a_stream(tmp_path):
    path = write(tmp_path / "train-0.tar", info("a.png", png(1)), info("a.cls", b"dog"))
    assert next(iter(stream(path, classes=["cat", "dog"], num_classes=2)))["label"].tolist() == [1]
    for text, told in ((b"5", "the label is 5, num_classes is 2"), (b"-1", "the label is -1"), (b"cow", "class 'cow'")):
        path = write(tmp_path / "train-0.tar", info("a.png", png(1)), info("a.cls", text))
        with pytest.raises(ValueError, match=told):
            next(iter(stream(path, classes=["cat", "dog"], num_classes=2)))


def test_one_bad_label_does_not_cost_the_rest_of_a_shard(tmp_path):
    members = [info(f"{n}.{kind}", data) for n in range(5) for kind, data in (("png", png(n)), ("cls", b"%d" % n))]
    members[1] = info("0.cls", b"?")
    path = write(tmp_path / "train-0.tar", *members)
    batches = iter(stream(path, max_skipped=0.5))
    assert {int(next(batches)["label"][0]) for _ in range(8)} == {1, 2, 3, 4}


def test_words_in_shards_that_are_indexed_point_to_prepare(tmp_path):
    path = write(tmp_path / "train-0.tar", info("a.png", png(1)), info("a.cls", b"dog"))
    with pytest.raises(ValueError, match=r"a.cls in .* is the word 'dog', .* smalto prepare source=tar"):
        READERS["index"](path)


def test_pixels_come_through(tmp_path):
    path = write(tmp_path / "train-0.tar", info(LONG + ".png", png(77)), form=tarfile.PAX_FORMAT)
    assert np.asarray(ImageReader(tmp_path, foreign(path), "train").read(0))[0, 0].tolist() == [77, 0, 0]
