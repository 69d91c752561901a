"""On real images every metric moves the way it should, and stays where it is blind."""

import math
from itertools import pairwise

import matplotlib as mpl
import pandas as pd
import pytest
import torch
from tiny_features import TinyFeatures
from torch import Tensor

from smalto.analysis.damage_study import LEVELS, study
from smalto.analysis.plots_damage import damage_curves
from smalto.analysis.shown import bundled_file, read_csv
from smalto.data.source_idx import FashionMnist
from smalto.losses.perceptual import PerceptualLoss
from smalto.metrics.lite0 import Lite0Features

N = 200
TESTED = {
    "blur": (1, 3),
    "noise": (5, 20),
    "jpeg": (50, 90),
    "dropped_classes": (5, 8),
    "duplicates": (0.5, 0.75),
}
PIXELS, CHOICES = ("blur", "noise", "jpeg"), ("dropped_classes", "duplicates")


def data() -> tuple[Tensor, Tensor]:
    _, _, grey, label = FashionMnist().load()[0]
    padded = torch.nn.functional.pad(torch.tensor(grey[:4000])[:, None], (2, 2, 2, 2))
    return padded.expand(-1, 3, -1, -1), torch.tensor(label[:4000])


@pytest.fixture(scope="module")
def networks() -> dict:
    return {"features": Lite0Features(size=64), "perceptual": PerceptualLoss(net="squeeze_caffe")}


@pytest.fixture(scope="module")
def measured(networks) -> pd.DataFrame:
    image, label = data()
    return study(image=image, label=label, num_images=N, levels=TESTED, **networks)


@pytest.fixture(scope="module", params=["measured", "bundled"])
def table(request) -> pd.DataFrame:
    """What the code gives, and what the notebook shows."""
    return request.getfixturevalue("measured") if request.param == "measured" else bundled()


def bundled() -> pd.DataFrame:
    return read_csv(bundled_file("damage_study.csv"))[0]


def values(table: pd.DataFrame, damage: str, metric: str) -> list[float]:
    return table.loc[table["damage"] == damage, metric].tolist()


def chance(share: float, num: int) -> float:
    """Three standard deviations of the difference of two shares near ``share``, each of ``num`` images."""
    return 3 * math.sqrt(2 * share * (1 - share) / num)


@pytest.mark.parametrize("damage", [*PIXELS, *CHOICES])
def test_fid_grows_with_every_damage(table, damage):
    fid = values(table, damage, "fid")
    assert fid[0] > 0  # other real images, not the reference itself
    assert all(low < high for low, high in pairwise(fid)), fid
    assert fid[-1] > 1.5 * fid[0]  # undamaged sets differ less: five of 200 scored 493 to 557


@pytest.mark.parametrize("damage", PIXELS)
def test_lpips_grows_and_psnr_falls_with_damaged_pixels(table, damage):
    lpips, psnr = values(table, damage, "lpips"), values(table, damage, "psnr")
    assert lpips[0] == 0
    assert all(low < high for low, high in pairwise(lpips)), lpips
    assert all(high > low for high, low in pairwise(psnr)), psnr


@pytest.mark.parametrize("damage", PIXELS)
def test_precision_falls_with_damaged_pixels(table, damage):
    """Far below that of undamaged images, though not always further: see the test after next."""
    before, *precision = values(table, damage, "precision")
    assert max(precision) < before
    assert precision[-1] < before - 2 * chance(before, N)


@pytest.mark.parametrize("damage", PIXELS)
def test_precision_falls_step_by_step_in_a_coarse_network(measured, damage):
    precision = values(measured, damage, "precision")
    assert all(low < high for high, low in pairwise(precision)), precision


def test_precision_may_rise_again_where_fid_and_recall_know_better():
    """Very noisy images resemble each other: a few real images' balls hold many of them (10 of 500 here)."""
    strong, strongest = (bundled().query("damage == 'noise' and level == @level").iloc[0] for level in (20, 40))
    assert strongest["precision"] > strong["precision"]
    assert strongest["fid"] > strong["fid"]
    assert strongest["recall"] <= strong["recall"]


@pytest.mark.parametrize("damage", CHOICES)
def test_precision_does_not_see_what_is_missing(table, damage):
    """Each image is a real one, so it is as precise as any."""
    rows = table[table["damage"] == damage]
    before = rows["precision"].iloc[0]
    for level, precision in zip(rows["level"], rows["precision"], strict=True):
        distinct = N * (1 - level) if damage == "duplicates" else N  # copies say nothing new
        # Classes differ in how easily they are covered: 0.05 for a set of fewer of them.
        assert precision == pytest.approx(before, abs=chance(before, distinct) + 0.05), level


@pytest.mark.parametrize("damage", CHOICES)
def test_recall_sees_what_is_missing(table, damage):
    recall = values(table, damage, "recall")
    assert recall[-1] < recall[0] - 2 * chance(recall[0], N)
    steps = pairwise(recall)
    assert all(low < high + chance(0.5, N) for high, low in steps), recall


def test_four_copies_of_each_image_leave_no_recall(table):
    """With k = 3 every ball shrinks to a point."""
    copied = table[(table["damage"] == "duplicates") & (table["level"] >= 0.75)]
    assert len(copied)
    assert (copied["recall"] == 0).all()


@pytest.mark.parametrize("damage", CHOICES)
def test_pairs_are_blind_to_what_is_missing(table, damage):
    rows = table[table["damage"] == damage]
    assert (rows["lpips"] == 0).all()
    assert rows["psnr"].nunique() == 1


def test_the_table_names_its_networks_and_holds_every_level(measured):
    expected = [(damage, level) for damage, levels in TESTED.items() for level in (0, *levels)]
    assert list(zip(measured["damage"], measured["level"], strict=True)) == expected
    assert set(measured["features"]) == {"lite0_64"}
    assert set(measured["perceptual"]) == {"lpips_squeeze_caffe"}
    assert not measured.isna().any(axis=None)


def test_a_study_repeats_itself_and_leaves_the_generator_alone(networks):
    image, label = data()
    state = torch.get_rng_state()
    small = {"image": image, "label": label, "num_images": 8, "levels": {"noise": (20,)}}
    small |= {"features": TinyFeatures(), "perceptual": networks["perceptual"]}
    one, again, other = study(**small), study(**small), study(**small, seed=1)
    pd.testing.assert_frame_equal(one, again)
    assert (other["fid"] != one["fid"]).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"levels": {"rain": (1,)}}, "unknown damage rain; there are blur"),
        ({"num_images": 2001}, "1 to 2000"),
        ({"levels": {"jpeg": (1.5,)}}, "whole number"),
        ({"levels": {"blur": (1,), "dropped_classes": (9,)}, "num_images": 1000}, "drop fewer classes"),
    ],
)
def test_impossible_studies_are_refused_before_anything_is_measured(change, said):
    image, label = data()
    with pytest.raises(ValueError, match=said):  # networks that are not there are not called
        study(**{"image": image, "label": label, "features": None, "perceptual": None, "num_images": N} | change)


def test_the_figure_has_a_row_per_metric_and_a_column_per_damage():
    from matplotlib import pyplot

    mpl.use("agg")
    table = bundled()
    axes = damage_curves(table)
    assert axes.shape == (5, len(LEVELS))
    dashed, line = axes[0, 0].get_lines()
    assert line.get_ydata().tolist() == values(table, "blur", "fid")
    assert set(dashed.get_ydata()) == {values(table, "blur", "fid")[0]}
    assert axes[0, 0].get_ylabel() == "FID\nlite0_160"
    assert axes[3, 0].get_ylabel() == "LPIPS\nlpips_squeeze_caffe"
    assert axes[1, 0].get_ylim() == (0, 1)
    pyplot.close("all")
