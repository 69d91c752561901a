"""Pickles that are small and make, or say that they make, more than there is: refused before they are loaded."""

import io
import os
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from fuzzing import survives
from official_files import saved
from smalto.evaluation.begun import Begun
from smalto.tasks.checkpoint import read_checkpoint
from smalto.tasks.safetensors import write_safetensors
from smalto.tasks.sharded_folder import INDEX, INDEX_CHECKSUM, damage, read_folder
from smalto.tasks.torch_file import read_torch_file
from tasks.test_integrity import folder_of

BEGIN = b"\x80\x02"
LEVELS = 40


def doubled(kind: bytes) -> bytes:
    """A tuple, or list, of the same twice, of the same twice, ...; each is written once."""
    made = b"K\x01\x85q\x00"
    for level in range(LEVELS):
        get, put = b"h" + bytes([level]), b"q" + bytes([level + 1])
        made += (b"0" + get + get + b"\x86" if kind == b"tuple" else b"0](" + get + get + b"e") + put
    return made


def late() -> bytes:
    """The same in lists that are filled from the outer ones to the inner ones: small wherever one looks."""
    made = b"".join(b"]q" + bytes([level]) + b"0" for level in range(LEVELS))
    for level in reversed(range(1, LEVELS)):
        made += b"h" + bytes([level]) + b"(" + 2 * (b"h" + bytes([level - 1])) + b"e0"
    return made + b"h" + bytes([LEVELS - 1])


HOSTILE = {
    "a key that is never hashed to its end": BEGIN + b"}" + doubled(b"tuple") + b"K\x01s.",
    "a function that is never printed to its end": BEGIN + doubled(b"list") + b")R.",
    "the same, filled late": BEGIN + late() + b")R.",
    "a storage that is never named to its end": BEGIN + b"(X\x07\x00\x00\x00storageK\x01" + late() + b"K\x01K\x01tQ.",
    "a table of gigabytes": BEGIN + b"}r\xff\xff\xff\x7f.",
    "a list that holds itself": BEGIN + b"]q\x00h\x00a.",
}


def in_archive(folder: Path, data: bytes) -> Path:
    path = saved(folder / "x.ckpt", {"a": 1})
    with ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, data if name.endswith("data.pkl") else content)
    return path


def in_old_file(folder: Path, data: bytes) -> Path:
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    start = buffer.getvalue().index(b"\x80\x02}q\x00.")
    (folder / "x.ckpt").write_bytes(buffer.getvalue()[:start] + data + b"\x80\x02]q\x00.")
    return folder / "x.ckpt"


@pytest.mark.parametrize("place", [in_archive, in_old_file])
@pytest.mark.parametrize("name", HOSTILE)
def test_checkpoints(name, place, tmp_path):
    path = place(tmp_path, HOSTILE[name])
    assert "could not be read as a checkpoint" in str(survives(read_torch_file, path))


@pytest.mark.parametrize("name", HOSTILE)
def test_the_index_of_a_folder(name, tmp_path):
    path = folder_of(tmp_path / "x.ckpt", {"state_dict": {"a": torch.randn(64, 32)}})
    (path / INDEX_CHECKSUM).unlink()
    (path / INDEX).write_bytes(HOSTILE[name])
    assert damage(path)
    assert INDEX in str(survives(read_folder, path))


def test_what_is_shared_in_good_faith_is_read(tmp_path):
    shared = {"betas": (0.9, 0.95), "names": ["a" * 100] * 50}
    content = {f"group{i}": [shared, (shared["betas"],) * 3] for i in range(500)}
    assert read_torch_file(saved(tmp_path / "x.ckpt", content)) == content


@pytest.mark.parametrize("name", HOSTILE)
def test_a_measurement_put_aside_by_somebody_else_begins_anew(name, tmp_path):
    class Sums:
        def state(self) -> dict[str, int]:
            return {"sum": 0}

        def load_state(self, state: dict[str, int]) -> None:
            assert state == {"sum": 0}

    path = in_archive(tmp_path, HOSTILE[name])
    begun = Begun(path, Sums())
    assert survives(lambda path: begun.restore(), path) is None
    assert not path.exists()


def test_pipes_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "x.ckpt")
    assert "no plain file" in str(survives(read_torch_file, tmp_path / "x.ckpt"))
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    os.mkfifo(tmp_path / "x.json")
    assert "no plain file" in str(survives(read_checkpoint, tmp_path / "x.safetensors"))
