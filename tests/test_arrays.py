"""Arrays from outside: what their headers claim, what they unpack to, and what kind of file they are."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fuzzing import survives
from smalto.arrays import npy_array, npz_array
from smalto.data.picture_sets import open_pictures
from smalto.data.text_blocks import read_features
from smalto.evaluation.blocks import FeatureBlocks
from smalto.metrics.distribution import Gaussian
from smalto.metrics.features import Features
from smalto.metrics.reference import Reference


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def member(shape: tuple[int, ...], data: bytes = b"", descr: str = "<f4") -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"shape": shape, "fortran_order": False, "descr": descr})
    return buffer.getvalue() + data


def packed(path: Path, how: int = zipfile.ZIP_DEFLATED, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def reference(path: Path) -> dict[str, np.ndarray]:
    gaussian = Gaussian(mean=torch.zeros(4), cov=torch.eye(4), n=9)
    Reference("tiny", "generation", "x", gaussian, torch.ones(3, 4), None).save(path)
    with np.load(path) as file:
        return dict(file)


def load(path: Path) -> Reference:
    return Reference.load(path, extractor="tiny", kind="generation")


def test_a_reference_is_read_back_and_compared_with_its_checksums(tmp_path):
    reference(tmp_path / "r.npz")
    assert load(tmp_path / "r.npz").pool.tolist() == torch.ones(3, 4).tolist()
    data = bytearray((tmp_path / "r.npz").read_bytes())
    place = data.index(np.ones(12, np.float32).tobytes())
    data[place] ^= 1
    (tmp_path / "r.npz").write_bytes(data)
    assert "CRC" in str(survives(load, tmp_path / "r.npz"))


def test_a_reference_that_unpacks_to_more_than_it_is(tmp_path):
    arrays = reference(tmp_path / "r.npz")
    np.savez_compressed(tmp_path / "r.npz", **arrays | {"pool": np.zeros((2**15, 1024), np.float32)})
    assert (tmp_path / "r.npz").stat().st_size < 2**19
    assert "compressed" in str(survives(load, tmp_path / "r.npz"))


@pytest.mark.parametrize("shape", [(10**12, 4), (10**9, 10**9), (-1, 4)])
def test_a_reference_that_claims_more_than_it_holds(shape, tmp_path):
    reference(tmp_path / "r.npz")
    with zipfile.ZipFile(tmp_path / "r.npz") as archive:
        entries = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    packed(tmp_path / "r.npz", zipfile.ZIP_STORED, **entries | {"pool": member(shape)})
    assert survives(load, tmp_path / "r.npz")


def test_an_index_that_claims_or_unpacks_to_anything(tmp_path):
    images = io.BytesIO()
    np.save(images, np.zeros((4, 8, 8, 3), np.uint8))
    for index in (member((10**12,), descr="<i8"), member((2**25 + 2**20,), bytes(2**28 + 2**23), "<i8")):
        packed(tmp_path / "x.npz", arr_0=images.getvalue(), index=index)
        assert "index cannot be read" in str(survives(open_pictures, tmp_path / "x.npz"))


def test_objects_run_nothing(tmp_path):
    head = member((1,), pickle.dumps(Runs(tmp_path / "ran")), "|O")
    packed(tmp_path / "x.npz", zipfile.ZIP_STORED, a=head)
    (tmp_path / "1.npy").write_bytes(head)
    for read in (lambda path: npz_array(path / "x.npz", "a"), lambda path: npy_array(path / "1.npy")):
        with pytest.raises(ValueError, match="bject"):
            read(tmp_path)
    assert survives(lambda path: read_features(path, ["1"]), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_text_features_of_another_kind_or_claim(tmp_path):
    np.savez(tmp_path / "zipped.npz", a=np.zeros((2, 8), np.float32))
    (tmp_path / "zipped.npz").rename(tmp_path / "0.npy")
    (tmp_path / "1.npy").write_bytes(member((10**12, 8)))
    np.save(tmp_path / "2.npy", np.array([["a"]]))
    (tmp_path / "3.npy").write_bytes(b"")
    for key in "0123":
        assert survives(lambda path, key=key: read_features(path, [key]), tmp_path)
    np.save(tmp_path / "4.npy", np.ones((1, 2, 8), np.float32))
    features, lengths = read_features(tmp_path, ["4", "4"])
    assert (features.shape, features.dtype, lengths.tolist()) == ((4, 8), np.float16, [2, 2])


def test_parts_of_an_evaluation_that_somebody_else_made_are_measured_again(tmp_path):
    blocks = FeatureBlocks(tmp_path / "parts", count=3)
    blocks.write(blocks.blocks[0], Features(torch.ones(3, 4), torch.ones(3, 2), torch.ones(3, 5)), None)
    assert blocks.missing() == []
    (file,) = (tmp_path / "parts").iterdir()
    np.savez_compressed(file, pool=np.zeros((2**24,), np.uint8))
    assert survives(lambda path: blocks.missing(), file) is None
    assert not file.exists()
