import pytest
import torch

from smalto.metrics.distribution import Gaussian
from smalto.metrics.probe import ClassMeans
from smalto.metrics.reference import Reference


@pytest.fixture
def reference(generator):
    return Reference(
        extractor="lite0_64",
        kind="generation",
        images="abc123",
        gaussian=Gaussian(
            mean=torch.randn(4, generator=generator, dtype=torch.float64),
            cov=torch.eye(4, dtype=torch.float64) / 3,
            n=11,
        ),
        pool=torch.randn(7, 4, generator=generator),
        classes=ClassMeans(mean=torch.randn(2, 4, generator=generator), std=torch.ones(4), count=torch.tensor([5, 6])),
    )


def test_round_trip_is_exact(reference, tmp_path):
    path = tmp_path / "new" / "reference.npz"
    reference.save(path)
    loaded = Reference.load(path, extractor="lite0_64", kind="generation")
    assert (loaded.extractor, loaded.kind, loaded.images) == ("lite0_64", "generation", "abc123")
    assert loaded.gaussian.n == 11
    for a, b in [
        (loaded.gaussian.mean, reference.gaussian.mean),
        (loaded.gaussian.cov, reference.gaussian.cov),
        (loaded.pool, reference.pool),
        (loaded.classes.mean, reference.classes.mean),
        (loaded.classes.std, reference.classes.std),
        (loaded.classes.count, reference.classes.count),
    ]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert [p.name for p in path.parent.iterdir()] == ["reference.npz"]


def test_without_classes(reference, tmp_path):
    bare = Reference(**{**vars(reference), "classes": None, "pool": torch.zeros(0, 4)})
    bare.save(tmp_path / "r.npz")
    loaded = Reference.load(tmp_path / "r.npz", extractor="lite0_64", kind="generation")
    assert loaded.classes is None
    assert loaded.pool.shape == (0, 4)


def test_refuses_another_extractor_or_kind(reference, tmp_path):
    reference.save(tmp_path / "r.npz")
    with pytest.raises(ValueError, match="measured with features lite0_64, this run uses inception"):
        Reference.load(tmp_path / "r.npz", extractor="inception", kind="generation")
    with pytest.raises(ValueError, match="is for generation, asked for was reconstruction"):
        Reference.load(tmp_path / "r.npz", extractor="lite0_64", kind="reconstruction")


def test_refuses_to_overwrite_and_foreign_files(reference, tmp_path):
    path = tmp_path / "r.npz"
    with pytest.raises(FileNotFoundError, match="no reference"):
        Reference.load(path, extractor="lite0_64", kind="generation")
    path.write_bytes(b"not a reference")
    with pytest.raises(FileExistsError):
        reference.save(path)
    with pytest.raises(ValueError, match="not a reference"):
        Reference.load(path, extractor="lite0_64", kind="generation")
    torch.save({"a": 1}, path)  # a zip, but not ours
    with pytest.raises(ValueError, match="not a reference"):
        Reference.load(path, extractor="lite0_64", kind="generation")
