"""A number of ``smalto evaluate`` is about what was asked: other files, other networks, other numbers."""

import json
import os
import threading

import numpy as np
import pytest
import torch

from forked_ranks import run_ranks
from picture_files import make_pixels, write_folder, write_npz
from smalto import evaluate
from smalto.data import content
from smalto.data.content import content_hash
from smalto.data.picture_sets import open_pictures
from smalto.errors import InputError, PathInUse
from smalto.runtime import compose

TINY = ["features=lite0", "features._target_=tiny_features.TinyFeatures", "~features.size", "~features.chunk_size"]
QUICK = [*TINY, "perceptual=none", "mlflow=false", "device=cpu"]


@pytest.fixture(autouse=True)
def _outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))


def run(*overrides) -> dict[str, float]:
    return evaluate.run(compose("evaluate", [*QUICK, *map(str, overrides)]))


def replace_in_place(path, other) -> None:
    """Other bytes of the same length and time: what a clock of coarse steps would show."""
    before, data = path.stat(), other.read_bytes()
    size = max(before.st_size, len(data))
    path.write_bytes(data.ljust(size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture
def real(tmp_path):
    return write_folder(tmp_path / "real", make_pixels(30, seed=0))


@pytest.fixture
def fake(tmp_path):
    """Images in subfolders."""
    write_folder(tmp_path / "fake/a/b", make_pixels(20, seed=0))
    return tmp_path / "fake"


@pytest.mark.parametrize("side", ["samples", "reference"])
def test_images_changed_in_place_are_measured_anew(tmp_path, real, fake, side):
    asked = (f"samples={fake}", f"reference={real}")
    first = run(*asked)
    assert run(*asked) == first
    other = write_folder(tmp_path / "other", make_pixels(30, seed=5, shift=0.6))
    for image in sorted((fake if side == "samples" else real).rglob("*.png")):
        replace_in_place(image, other / image.name)
    changed = run(*asked)
    assert changed["fid_tiny"] > 2 * first["fid_tiny"]
    for table in (tmp_path / "outputs/evaluations").iterdir():
        table.unlink()
    assert run(*asked) == changed, "references and parts kept from before were not used"


def test_another_network_behind_the_same_name_is_another_measurement(real, fake, monkeypatch):
    asked = (f"samples={fake}", f"reference={real}")
    first = run(*asked)
    build = evaluate.build

    def with_other_weights(node, *args, **kwargs):
        made = build(node, *args, **kwargs)
        if isinstance(made, torch.nn.Module):
            made.head.mul_(2)
        return made

    monkeypatch.setattr("smalto.evaluation_start.build", with_other_weights)
    assert run(*asked)["is_tiny"] != first["is_tiny"]


def test_a_table_from_before_is_measured_again_and_a_foreign_file_is_left(tmp_path, real, fake):
    out = tmp_path / "table.json"
    asked = (f"samples={fake}", f"reference={real}", f"out={out}")
    expected = run(*asked)
    table = json.loads(out.read_text())
    del table["requested"]["measured"]
    out.write_text(json.dumps(table | {"rows": []}))
    assert run(*asked) == expected
    out.write_text("my notes")
    with pytest.raises(PathInUse, match=r"table\.json is not a table of smalto evaluate; give another out="):
        run(*asked)
    assert out.read_text() == "my notes"
    assert run(*asked, "overwrite=true") == expected


def test_content_is_remembered_only_while_nothing_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SETTLED_SECONDS", -10.0)
    files, memory = [tmp_path / "a", tmp_path / "b"], tmp_path / "memory"
    for file in files:
        file.write_bytes(b"12345")
    first = content_hash(files, memory=memory)
    read = []
    real = content.file_hash
    monkeypatch.setattr(content, "file_hash", lambda path, advance: read.append(path.name) or real(path, advance))
    assert content_hash(files, memory=memory) == first
    assert read == []
    before = files[1].stat()
    files[1].write_bytes(b"12346")
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(files, memory=memory) != first, "same size and time, but the inode tells"
    assert read == ["a", "b"]
    for kept in memory.iterdir():
        kept.write_bytes(b"\xff garbage")
    assert content_hash(files, memory=memory) == content_hash(files), "a damaged memory is no memory"


def test_what_changed_a_moment_ago_is_read_again(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    content_hash([tmp_path / "a"], memory=tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_fingerprints_follow_content_alone(tmp_path):
    images = make_pixels(6, seed=0)
    folder, npz = write_folder(tmp_path / "x", images), write_npz(tmp_path / "x.npz", images)
    before = [open_pictures(path).fingerprint() for path in (folder, npz)]
    for file in (*folder.iterdir(), npz):
        os.utime(file, (1, 1))
    assert [open_pictures(path).fingerprint() for path in (folder, npz)] == before
    replace_in_place(folder / "0002.png", folder / "0003.png")
    write_npz(npz, images.flip(0))
    assert not {open_pictures(path).fingerprint() for path in (folder, npz)} & set(before)


# Pairs


@pytest.fixture
def rebuilt(tmp_path):
    """Reconstructions of ``real`` within 3 of 255."""
    return make_pixels(30, seed=0) // 4 * 4


def pairs(real, samples, *more) -> dict[str, float]:
    return run(f"samples={samples}", f"reference={real}", "kind=reconstruction", *more)


def test_the_index_of_a_shuffled_npz_is_honoured(tmp_path, real, rebuilt, capsys):
    order = np.random.default_rng(0).permutation(30)
    shuffled = write_npz(tmp_path / "shuffled.npz", rebuilt[torch.from_numpy(order)], index=order)
    expected = pairs(real, write_folder(tmp_path / "rebuilt", rebuilt))["psnr"]
    assert pairs(real, shuffled)["psnr"] == pytest.approx(expected)
    assert "pairs: by number" in capsys.readouterr().out
    assert pairs(real, shuffled, "pairing=order")["psnr"] < 20
    half = pairs(real, shuffled, "reference_limit=10")
    assert half["psnr"] > 40, "the first ten originals, wherever their partners lie"
    broken = write_npz(tmp_path / "twice.npz", rebuilt, index=np.zeros(30, np.int64))
    with pytest.raises(InputError, match=r"twice\.npz: index must hold the number of each of its 30 images"):
        pairs(real, broken)


def test_names_that_do_not_agree_are_refused(tmp_path, real, rebuilt):
    folder = write_folder(tmp_path / "rebuilt", rebuilt)
    expected = pairs(real, folder)["psnr"]
    (folder / "0003.png").rename(folder / "renamed.png")
    with pytest.raises(InputError, match=r"0003 on the one side, renamed on the other.*pairing=order"):
        pairs(real, folder)
    assert pairs(real, folder, "pairing=order")["psnr"] < expected - 5
    with pytest.raises(InputError, match="pairing is 'size', must be name or order"):
        pairs(real, folder, "pairing=size")
    (folder / "renamed.png").rename(folder / "0003.jpg")
    (folder / "0004.png").rename(folder / "0003.png")
    with pytest.raises(InputError, match="two images named 0003"):
        pairs(real, folder)


def test_names_that_are_numbers_need_no_zeros(tmp_path, rebuilt):
    sets = []
    for name, width in (("short", 1), ("wide", 4)):
        folder = write_folder(tmp_path / name, rebuilt)
        for number in reversed(range(30)):
            (folder / f"{number:04d}.png").rename(folder / f"n{number + 1:0{width}d}.png")
        for file in sorted(folder.iterdir()):
            file.rename(folder / file.name[1:])
        sets.append(folder)
    assert pairs(*sets)["psnr"] > 70
    plain = write_npz(tmp_path / "plain.npz", rebuilt)
    with pytest.raises(InputError, match="do not bear the same names"):
        pairs(sets[0], plain)  # 1, 10, 11, ... or 1, 2, 3, ...: nobody can tell
    assert pairs(sets[1], plain)["psnr"] > 70


# Several processes


def test_two_identical_evaluations_make_one_table(tmp_path, real, fake):
    asked = (f"samples={fake}", f"reference={real}")
    expected = run(*asked)
    found, start = [], threading.Barrier(2)
    config = compose("evaluate", [*QUICK, *asked, f"out={tmp_path / 'both.json'}"])

    def work():
        start.wait()
        found.append(evaluate.run(config))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]
    assert sorted(path.name for path in tmp_path.glob("both*")) == ["both.json"]


def test_what_stops_the_first_process_stops_all(tmp_path, real):
    def refused(rank):
        try:
            return run(f"samples={tmp_path / 'nowhere'}", f"reference={real}")
        except Exception as error:
            return str(error)

    first, second = run_ranks(refused, 2)
    assert first.startswith("no folder, .npz file or image shards at")
    assert second == f"the first process stopped: {first}"
