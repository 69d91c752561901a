import pytest
import torch

from picture_files import make_pixels, write_folder, write_npz
from smalto.data.picture_sets import open_pictures
from smalto.data.ranks import Ranks
from smalto.evaluation import begun
from smalto.evaluation.pairs import from_sets, measure_pairs
from smalto.evaluation.report import Measured, flat, show
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.scores import Scores


def test_pairs_are_matched_by_name_or_by_order(tmp_path):
    images = make_pixels(6, seed=0)
    originals = open_pictures(write_folder(tmp_path / "a", images))
    same = write_folder(tmp_path / "b", images // 2)
    (same / "0003.png").rename(same / "0003.PNG")
    pair = from_sets(originals, open_pictures(same))(range(6))
    assert torch.equal(pair[0] // 2, pair[1])
    packed = open_pictures(write_npz(tmp_path / "c.npz", images // 2))
    assert torch.equal(from_sets(originals, packed)(range(2, 4))[1], images[2:4] // 2)
    with pytest.raises(ValueError, match="holds 5 images"):
        from_sets(originals, open_pictures(write_folder(tmp_path / "d", images[:5])))
    with pytest.raises(ValueError, match="give image_size=SIDE"):
        from_sets(originals, open_pictures(write_folder(tmp_path / "e", make_pixels(6, seed=0, side=8))))(range(2))


def test_a_killed_pass_goes_on(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(begun, "SAVE_SECONDS", 0.0)
    images = make_pixels(30, seed=0)
    sets = [open_pictures(write_folder(tmp_path / n, x)) for n, x in (("a", images), ("b", images // 2))]
    whole = from_sets(*sets)
    seen = []

    def killed(indices):
        seen.append(indices.start)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return whole(indices)

    def measure(pairs, folder):
        return measure_pairs(
            pairs,
            count=30,
            metrics=ReconstructionMetrics(features=tiny),
            part_file=tmp_path / folder / "pairs",
            batch_size=8,
            ranks=Ranks(),
        )

    expected = measure(whole, "whole").values
    with pytest.raises(KeyboardInterrupt):
        measure(killed, "part")
    assert measure(killed, "part").values == expected
    assert seen == [0, 8, 16, 16, 24]
    assert list((tmp_path / "part").iterdir()) == []


def rows() -> list[Measured]:
    found = []
    for scale in (1.0, 2.5):
        scores = Scores(values={"fid_tiny": 10 * scale, "kid_tiny": 1e-5}, errors={"kid_tiny": 1e-6})
        scores.missing["sfid_tiny"] = "no spatial statistics"
        found.append(Measured(scores, {"cfg_scale": scale}))
    return found


def test_flat_names_and_plain_round_trip():
    assert flat(rows()[:1]) == {"fid_tiny": 10.0, "kid_tiny": 1e-5}
    assert flat(rows())["cfg_scale=2.5/fid_tiny"] == 25.0
    again = Measured.from_plain(rows()[1].plain())
    assert again == rows()[1]


def test_the_table_says_what_is_missing_and_why(capsys):
    show(rows()[:1], {"features": "tiny"})
    text = capsys.readouterr().out
    assert "10.0000" in text
    assert "1.00e-06" in text
    assert "not computed: sfid_tiny: no spatial statistics" in text
    assert "features: tiny" in text
    show(rows(), {})
    text = capsys.readouterr().out
    assert text.count("25.0000") == 1
    assert "cfg_scale" in text
