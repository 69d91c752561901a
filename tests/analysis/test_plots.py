import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from smalto.analysis.plots import codebook_curve, learning_curves, sampling_curve, scaling_curve
from smalto.analysis.power_law import fit_power_law
from smalto.analysis.shown import bundled_file, read_csv

mpl.use("agg")


@pytest.fixture(autouse=True)
def _close():
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def line(ax, label: str):
    return next(line for line in ax.get_lines() if line.get_label() == label)


def test_learning_curves_are_named():
    curves = pd.DataFrame({"run_id": ["x", "x", "y"], "step": [1, 2, 1], "value": [3.0, 2.0, 5.0]})
    ax = learning_curves(curves, labels={"y": "large", "x": "small"})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["large", "small"]
    assert line(ax, "small").get_ydata().tolist() == [3, 2]


def test_scaling_curve_shows_points_law_and_interval():
    x = np.geomspace(1e6, 1e9, 6)
    table = pd.DataFrame({"parameters": x, "loss": 300 * x**-0.3 + 2, "label": list("abcdef")})
    law = fit_power_law(x, table["loss"] + [0.01, -0.01, 0.01, -0.01, 0.01, -0.01])
    ax = scaling_curve(table, x="parameters", y="loss", law=law)
    assert ax.get_xscale() == "log"
    assert sum(len(line.get_xdata()) == 6 for line in ax.get_lines()) == 1
    assert len(ax.collections) == 1
    assert [text.get_text() for text in ax.texts] == list("abcdef")
    assert scaling_curve(table, x="parameters", y="loss").get_legend() is None


def test_codebook_curve_draws_one_arm_of_the_cross_and_the_paper_in_grey():
    paper, _ = read_csv(bundled_file("paper_codebook.csv"))
    ax = codebook_curve(paper.iloc[:0], x="codebook_dim", y="psnr", reference=paper)
    assert line(ax, "paper").get_xdata().tolist() == [4, 8, 32, 256]
    ax = codebook_curve(paper, x="codebook_size", y="psnr", reference=paper)
    assert line(ax, "measured").get_xdata().tolist() == [4096, 8192, 16384, 32768]
    assert line(ax, "measured").get_ydata().tolist() == line(ax, "paper").get_ydata().tolist()


def test_rfid_of_another_network_gets_an_axis_of_its_own():
    paper, _ = read_csv(bundled_file("paper_codebook.csv"))
    same = codebook_curve(paper, x="codebook_dim", y="rfid", reference=paper)
    assert len(same.figure.axes) == 1
    other = codebook_curve(paper.assign(features="lite0_160"), x="codebook_dim", y="rfid", reference=paper)
    assert len(other.figure.axes) == 2
    assert "lite0_160" in other.get_ylabel()
    assert "inception" in other.figure.axes[1].get_ylabel()


def test_top_k_zero_is_all_and_last():
    table, _ = read_csv(bundled_file("paper_top_k.csv"))
    ax = sampling_curve(table, x="top_k", y="fid")
    assert [label.get_text() for label in ax.get_xticklabels()][-2:] == ["10000", "all"]
    assert ax.get_lines()[0].get_ydata()[-1] == 3.075


def test_guidance_curves_by_model_follow_the_scale():
    table, _ = read_csv(bundled_file("paper_generation.csv"))
    long = table[table["epochs"] == 300]
    ax = sampling_curve(long, x="cfg_scale", y="fid", by="model", reference=True)
    assert line(ax, "paper, B").get_xdata().tolist() == [1, 1.5, 1.75, 2, 2.25, 2.5]
    assert "inception" in ax.get_ylabel()
    trade = sampling_curve(long, x="is", y="fid", by="model")
    assert line(trade, "L").get_ydata().tolist() == [13.452, 4.079, 3.805, 4.407]
