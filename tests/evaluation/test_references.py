import pickle
import threading

import numpy as np
import pytest
import torch
from tiny_features import TinyFeatures

from forked_ranks import run_ranks
from picture_files import make_pixels, write_folder, write_npz
from smalto.data.ranks import Ranks, shared_device
from smalto.evaluation import begun
from smalto.evaluation.references import find_reference
from smalto.metrics.reference import chain_hash


class NamedInception(TinyFeatures):
    """Stands for the network whose statistics ADM's files hold."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "inception"


def find(path, tmp_path, features, rules, **settings):
    given = {"kind": "generation", "cache_dir": tmp_path / "cache", "batch_size": 7}
    return find_reference(path, features=features, rules=rules, **given | settings)


def test_measured_once_whatever_holds_the_images(tmp_path, tiny, rules):
    images = make_pixels(30, seed=0)
    folder, npz = write_folder(tmp_path / "images", images), write_npz(tmp_path / "x.npz", images)
    first = find(folder, tmp_path, tiny, rules)
    second = find(npz, tmp_path, tiny, rules, batch_size=30)
    torch.testing.assert_close(first.gaussian.cov, second.gaussian.cov, rtol=1e-12, atol=1e-15)
    assert torch.equal(first.pool, second.pool)
    assert first.content == second.content == chain_hash("", images)
    assert first.gaussian.n == 30

    class Refuses(TinyFeatures):
        def extract(self, image):
            raise AssertionError("measured again")

    assert find(folder, tmp_path, Refuses(), rules).content == first.content
    file = next((tmp_path / "cache").glob("images-generation-tiny-*.npz"))
    assert find(file, tmp_path, Refuses(), rules).content == first.content, "a reference file is taken as it is"
    assert find(folder, tmp_path, tiny, rules, limit=10).gaussian.n == 10


def test_changed_images_are_measured_anew(tmp_path, tiny, rules):
    folder = write_folder(tmp_path / "images", make_pixels(12, seed=0))
    before = find(folder, tmp_path, tiny, rules)
    write_folder(tmp_path / "images" / "more", make_pixels(3, seed=1))
    assert find(folder, tmp_path, tiny, rules).gaussian.n == before.gaussian.n + 3


def test_kinds_and_extractors_are_not_mixed_up(tmp_path, tiny, rules):
    folder = write_folder(tmp_path / "images", make_pixels(12, seed=0))
    find(folder, tmp_path, tiny, rules)
    file = next((tmp_path / "cache").glob("*.npz"))
    with pytest.raises(ValueError, match="reconstructions with the very images they were made from"):
        find(file, tmp_path, tiny, rules, kind="reconstruction")
    with pytest.raises(ValueError, match="measured with features tiny, this run uses inception"):
        find(file, tmp_path, NamedInception(), rules)


def adm_file(path, features, images, **more):
    """A reference in ADM's layout: statistics of a larger set than its images."""
    found = features(images)
    stats = {}
    for mean, cov, x in (("mu", "sigma", found.pool), ("mu_s", "sigma_s", found.spatial)):
        stats |= {mean: x.double().mean(0).numpy(), cov: np.cov(x.double().numpy(), rowvar=False)}
    return write_npz(path, images[:20], **stats | more)


def test_adm_reference(tmp_path, tiny, rules):
    """Statistics from the file, features for precision and recall from its images."""
    images = make_pixels(50, seed=0)
    path = adm_file(tmp_path / "VIRTUAL.npz", tiny, images)
    found = find(path, tmp_path, NamedInception(), rules)
    expected = find(write_folder(tmp_path / "all", images), tmp_path, tiny, rules)
    torch.testing.assert_close(found.gaussian.cov, expected.gaussian.cov, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.spatial.mean, expected.spatial.mean, rtol=1e-9, atol=1e-12)
    assert found.gaussian.n is None, "the file does not say how many"
    assert torch.equal(found.pool, expected.pool[:20])
    with pytest.raises(ValueError, match=r"rFID of 2\.19 was measured as 4\.28"):
        find(path, tmp_path, NamedInception(), rules, kind="reconstruction")


def test_adm_statistics_are_of_no_other_network(tmp_path, tiny, rules, caplog):
    images = make_pixels(50, seed=0)
    both = adm_file(tmp_path / "both.npz", tiny, images)
    assert find(both, tmp_path, tiny, rules).gaussian.n == 20
    assert "its statistics are Inception's" in caplog.text
    np.savez(tmp_path / "only.npz", mu=np.zeros(48), sigma=np.eye(48))
    with pytest.raises(ValueError, match="no images, this run uses tiny; choose features=inception"):
        find(tmp_path / "only.npz", tmp_path, tiny, rules)
    assert find(tmp_path / "only.npz", tmp_path, NamedInception(), rules).spatial is None
    np.savez(tmp_path / "wide.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="mu has 64 features, Inception gives 48"):
        find(tmp_path / "wide.npz", tmp_path, NamedInception(), rules)


def test_a_killed_measurement_goes_on(tmp_path, tiny, rules, monkeypatch):
    folder = write_folder(tmp_path / "images", make_pixels(30, seed=0))
    expected = find(folder, tmp_path / "whole", tiny, rules)
    monkeypatch.setattr(begun, "SAVE_SECONDS", 0.0)

    class Killed(TinyFeatures):
        seen = 0

        def extract(self, image):
            Killed.seen += 1
            if Killed.seen == 4:
                raise KeyboardInterrupt
            return super().extract(image)

    with pytest.raises(KeyboardInterrupt):
        find(folder, tmp_path, Killed(), rules)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "what was done, and nothing half-written"
    Killed.seen = 4
    found = find(folder, tmp_path, Killed(), rules)
    assert Killed.seen == 4 + 2, "three of five batches were done already"
    assert torch.equal(found.gaussian.cov, expected.gaussian.cov)
    assert torch.equal(found.pool, expected.pool)
    assert found.content == expected.content
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_two_processes_measure_what_one_does(tmp_path, tiny, rules):
    folder = write_folder(tmp_path / "images", make_pixels(45, seed=0))
    expected = find(folder, tmp_path / "one", tiny, rules)

    def measure(rank):
        with Ranks() as ranks:
            found = find(folder, tmp_path / "two", TinyFeatures(), rules, rank=rank, world_size=ranks.world_size)
            return found.gaussian.cov.numpy(), found.gaussian.n, found.spatial.mean.numpy(), found.pool.shape

    for cov, n, spatial, shape in run_ranks(measure, 2):
        np.testing.assert_allclose(cov, expected.gaussian.cov.numpy(), rtol=1e-9, atol=1e-14)
        np.testing.assert_allclose(spatial, expected.spatial.mean.numpy(), rtol=1e-9)
        assert (n, tuple(shape)) == (45, (45, 48))


def test_sums_lie_where_they_can_be_shared():
    """gloo gathers CPU tensors only; alone, or with NCCL, they stay where the network works."""

    def where(rank):
        with Ranks():
            return str(shared_device(torch.device("cuda")))

    assert run_ranks(where, 2) == ["cpu", "cpu"]
    assert shared_device(torch.device("cuda")) == torch.device("cuda")


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "pickle"])
def test_damaged_parts_and_cached_references_are_measured_again(tmp_path, tiny, rules, monkeypatch, caplog, damage):
    folder = write_folder(tmp_path / "images", make_pixels(30, seed=0))
    expected = find(folder, tmp_path, tiny, rules)

    def spoil(file):
        whole = file.read_bytes()
        planted = pickle.dumps(SystemExit)
        file.write_bytes({"truncated": whole[:-200], "text": b"x" * 99, "empty": b"", "pickle": planted}[damage])

    spoil(next((tmp_path / "cache").glob("*.npz")))
    assert torch.equal(find(folder, tmp_path, tiny, rules).gaussian.cov, expected.gaussian.cov)
    assert "measuring the images again" in caplog.text
    for kept in (tmp_path / "cache").iterdir():
        kept.unlink()
    monkeypatch.setattr(begun, "SAVE_SECONDS", 0.0)
    stop = iter([False] * 3 + [True] + [False] * 99)

    class Killed(TinyFeatures):
        def extract(self, image):
            if next(stop):
                raise KeyboardInterrupt
            return super().extract(image)

    with pytest.raises(KeyboardInterrupt):
        find(folder, tmp_path, Killed(), rules)
    spoil(next((tmp_path / "cache").glob("*.part*")))
    found = find(folder, tmp_path, Killed(), rules)
    assert "measuring from the beginning" in caplog.text
    assert torch.equal(found.gaussian.cov, expected.gaussian.cov)
    assert found.content == expected.content
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]


def test_many_processes_measure_one_reference(tmp_path, tiny, rules):
    """None waits for another, none is in another's way, one file is left."""
    folder = write_folder(tmp_path / "images", make_pixels(12, seed=0))
    expected = find(folder, tmp_path / "alone", tiny, rules)
    together = threading.Barrier(4)
    found: list[object] = []

    class Slow(TinyFeatures):
        def extract(self, image):
            if threading.current_thread() is not threading.main_thread():
                together.wait(20)  # all have seen that there is no file
            return super().extract(image)

    def measure():
        try:
            found.append(find(folder, tmp_path, Slow(), rules, batch_size=12).content)
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected.content] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_other_weights_are_another_reference(tmp_path, tiny, rules):
    folder = write_folder(tmp_path / "images", make_pixels(12, seed=0))
    find(folder, tmp_path, tiny, rules)
    other = TinyFeatures()
    other.head.add_(1)
    find(folder, tmp_path, other, rules)
    assert len(list((tmp_path / "cache").iterdir())) == 2
