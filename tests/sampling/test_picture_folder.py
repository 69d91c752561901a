import numpy as np
import pytest
import torch

from smalto.sampling.writer import PictureFolder, pack_npz


@pytest.fixture
def images(generator) -> torch.Tensor:
    return torch.randint(256, (5, 3, 6, 4), dtype=torch.uint8, generator=generator)


def channels_last(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_pixels_survive(tmp_path, images):
    folder = PictureFolder(tmp_path / "a" / "b")
    folder.write([7, 3, 0, 1, 2], images)
    assert np.array_equal(folder.read([7, 3, 0, 1, 2]), channels_last(images))
    assert sorted(path.name for path in folder.path.iterdir())[-1] == "000007.png"
    assert not list(folder.path.glob("*.tmp"))


def test_knows_what_is_missing(tmp_path, images):
    folder = PictureFolder(tmp_path)
    (tmp_path / "000002.tmp").write_bytes(b"a job was killed here")
    folder.write([1, 4], images[:2])
    assert PictureFolder(tmp_path).missing(range(5)) == [0, 2, 3]


@pytest.mark.parametrize("chunk", [2, 256])
def test_packed_file_reads_as_npz(tmp_path, images, chunk):
    folder = PictureFolder(tmp_path / "images")
    folder.write([4, 3, 2, 1, 0], images)
    target = tmp_path / "samples.npz"
    pack_npz(folder, 5, target, labels=np.arange(5) * 10, chunk=chunk)
    with np.load(target) as archive:
        order = archive["index"]
        assert archive["arr_0"].dtype == np.uint8
        assert sorted(order) == [0, 1, 2, 3, 4] != order.tolist(), "shuffled"
        assert np.array_equal(archive["arr_0"], channels_last(images)[::-1][order])
        assert archive["labels"].tolist() == (order * 10).tolist()
    pack_npz(folder, 4, target, chunk=chunk, shuffle_seed=None)
    with np.load(target) as archive:
        assert np.array_equal(archive["arr_0"], channels_last(images)[::-1][:4])
        assert "labels" not in archive
    assert not list(tmp_path.glob("*.tmp"))


def test_a_missing_picture_leaves_no_packed_file(tmp_path, images):
    folder = PictureFolder(tmp_path / "images")
    folder.write([0, 1], images[:2])
    with pytest.raises(FileNotFoundError):
        pack_npz(folder, 3, tmp_path / "samples.npz", labels=np.arange(3), chunk=1)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
