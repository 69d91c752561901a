"""Picture files from outside: what is opened, what is refused by name, and what it may cost."""

import contextlib
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from smalto.data.encode import Item, Recipe, encode
from smalto.data.picture_sets import open_pictures
from smalto.data.pictures import FORMATS, MAX_BYTES, MAX_PIXELS, open_picture
from smalto.data.reader import ImageReader
from smalto.data.sources import Folder, Record
from smalto.data.transforms import decode_image, to_rgb
from smalto.data.write import TarShard

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def packed(image: Image.Image, image_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, *, depth: int, colour: int) -> bytes:
    """A PNG that claims a size; its pixels are missing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """An EXIF block from (tag, type, count, value) as they are."""
    table = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + table + b"\0" * 4


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """Stands where Ghostscript would be, and leaves a file when it is started."""
    started = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow remembers what it found
    return started


def doors(folder: Path, data: bytes):
    """Every way by which a picture file of others gets into this package."""
    (folder / "set").mkdir()
    (folder / "set" / "a.png").write_bytes(data)
    with TarShard(folder / "train-0.tar") as shard:
        shard.add("a.png", data)
        shard.close()
    meta = {"splits": {"train": {"shards": [{"name": str(folder / "train-0.tar")}]}}, "encoding": None}
    yield lambda: decode_image(data)
    yield lambda: open_pictures(folder / "set").read([0])
    yield lambda: ImageReader(folder, meta, "train").read(0)
    yield lambda: _prepared(Folder(path=folder / "set")[0])


def _prepared(record: Record) -> None:
    result = encode(Item("0", record.name, record), Recipe("keep", None, "png", 1))
    if result.data is None:
        raise ValueError(result.reason)


def test_a_postscript_file_starts_no_program_whatever_it_is_called(tmp_path, ghostscript):
    for door in doors(tmp_path, EPS):
        with pytest.raises(ValueError, match="none of PNG, JPEG"):
            door()
    assert not ghostscript.exists()
    with contextlib.suppress(Exception):  # the trap works: Pillow itself starts it
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()


def test_only_one_function_opens_pictures():
    root = Path(__file__).parents[2] / "src" / "smalto"
    found = [p.name for p in root.rglob("*.py") if re.search(r"Image\.open\(", p.read_text())]
    assert found == ["pictures.py"]


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_usual_formats_are_opened(image_format):
    if image_format == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    assert decode_image(packed(Image.new("RGB", (5, 4), (9, 9, 9)), image_format)).size == (5, 4)


@pytest.mark.parametrize("image_format", ["ICO", "TGA", "PCX", "SGI", "DDS", "EPS", "PDF"])
def test_other_formats_are_refused_by_one_sentence(image_format):
    with pytest.raises(ValueError, match="none of PNG, JPEG") as caught:
        decode_image(packed(Image.new("RGB", (16, 16)), image_format))
    assert "BytesIO" not in str(caught.value)


def test_an_empty_file_is_called_empty():
    with pytest.raises(ValueError, match="the file is empty"):
        decode_image(b"")


@pytest.mark.parametrize(
    ("width", "height", "depth", "colour"),
    [
        (13_300, 13_300, 16, 0),  # grey of 16 bits: below twice Pillow's limit, which Pillow opens with a warning
        (9_000, 9_000, 16, 2),  # RGB of 16 bits: few enough pixels, twice the bytes
        (9_000, 9_000, 8, 6),  # RGBA
        (13_300, 13_300, 1, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_would_fill_the_memory_is_refused_before_it_is_decoded(width, height, depth, colour):
    with pytest.raises(ValueError, match=rf"{width}x{height} pixels.* make it smaller"):
        open_picture(png_header(width, height, depth=depth, colour=colour))


def test_the_limits_let_large_photographs_pass():
    assert open_picture(png_header(9_400, 9_500, depth=8, colour=2)).size == (9_400, 9_500)
    assert MAX_PIXELS >= 9_400 * 9_500
    assert MAX_BYTES == 3 * MAX_PIXELS


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "side"), [("I;16", 9_400), ("RGBA", 8_150), ("LA", 9_400), ("P", 9_400)])
def test_the_largest_pictures_cost_less_than_a_gigabyte(tmp_path, mode, side):
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (side, side)).save(tmp_path / "a.png", **options)
    assert (tmp_path / "a.png").stat().st_size < 2**20
    code = (
        "import sys; from pathlib import Path; from smalto.data.transforms import decode_image\n"
        "decode_image(Path(sys.argv[1]).read_bytes())\n"
        "print(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.png"], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**20  # kB


def test_strips_change_no_pixel(monkeypatch):
    rng = np.random.default_rng(0)
    pictures = {
        "RGBA": Image.fromarray(rng.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA"),
        "I;16": Image.fromarray(rng.integers(0, 65536, (37, 23)).astype(np.uint16)),
        "I": Image.fromarray(rng.integers(-9, 70_000, (37, 23)).astype(np.int32)),
    }
    for image in pictures.values():
        whole = np.asarray(to_rgb(image))
        monkeypatch.setattr("smalto.data.transforms._STRIP", 23 * 5)
        assert np.array_equal(np.asarray(to_rgb(image)), whole)
        monkeypatch.undo()


TEXT_FOR_A_NUMBER = exif((0x0112, 3, 1, b"\6\0\0\0"), (0x011A, 2, 4, b"72\0\0"))


def test_a_damaged_exif_field_beside_the_rotation_does_no_harm(tmp_path):
    for number, door in enumerate(doors(tmp_path, packed(Image.new("RGB", (40, 36)), "JPEG", exif=TEXT_FOR_A_NUMBER))):
        found = door()
        if number == 0:
            assert found.size == (36, 40)


@pytest.mark.filterwarnings("ignore:.*EXIF data", "ignore:.*[Tt]ag")
def test_no_exif_block_stops_a_job():
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (12, 8))
    sizes = set()
    for _ in range(2000):
        block = bytearray(TEXT_FOR_A_NUMBER)
        for _ in range(rng.integers(1, 4)):
            block[rng.integers(6, len(block))] = rng.integers(256)
        sizes.add(decode_image(packed(image, "JPEG", exif=bytes(block))).size)
    assert sizes == {(8, 12), (12, 8)}  # turned where the orientation survived


def test_pipes_devices_and_huge_files_are_no_pictures(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(2**40)
    source = Folder(path=tmp_path)
    for index, reason in enumerate(("bytes", "no plain file", "no plain file")):
        with pytest.raises(ValueError, match=reason):
            source[index]
