import pandas as pd
import pytest

from smalto.analysis.runs import runs_table
from smalto.analysis.scaling import GPTShape
from smalto.analysis.tables import codebook_table, sampling_table, scaling_table, short_number, vary

SELECTORS = [codebook_table, scaling_table, sampling_table]


@pytest.fixture(scope="module")
def runs(store) -> pd.DataFrame:
    return runs_table(f"sqlite:///{store}", step_of="val/loss")


def test_scaling_takes_one_study_and_the_best_run_of_a_size(runs):
    table = scaling_table(runs)
    assert table["loss"].tolist() == [3.0, 2.5, 2.25, 2.125]
    assert table["fid"].tolist() == [60.0, 50.0, 45.0, 42.5]
    assert set(table["features"]) == {"lite0_160"}
    shape = GPTShape(dim=64, num_layers=2, num_heads=4, vocab_size=512, num_codes=64, num_classes=10)
    first = table.iloc[0]
    assert (first["parameters"], first["forward_flops"]) == (shape.parameters, shape.forward_flops)
    assert first["images"] == 6400  # 100 steps of 64
    assert first["training_flops"] == 6400 * shape.training_flops


def test_images_of_a_run_limited_by_epochs_come_from_its_last_step(runs):
    endless = runs.assign(**{"params.trainer/max_steps": -1, "step": 49})
    assert set(scaling_table(endless)["images"]) == {50 * 64}


def test_codebooks_take_the_newest_run_of_each(runs):
    table = codebook_table(runs)
    pairs = list(zip(table["codebook_dim"], table["codebook_size"], strict=True))
    assert pairs == [(4, 512), (8, 128), (8, 512), (8, 2048), (32, 512)]
    assert table["psnr"].tolist() == [4, 8, 8, 8, 32]
    assert table["rfid"].tolist() == [512, 128, 512, 2048, 512]
    assert set(table["usage"]) == {50.0}


def test_samplings_are_of_one_generator(runs):
    table = sampling_table(runs)
    assert set(table["ckpt"]) == {"a.ckpt"}
    assert len(table) == 4
    assert vary(table, "cfg_scale")["fid"].tolist() == [11, 12, 13]
    assert vary(table, "top_k")["fid"].tolist() == [12, 62]


def test_guidance_measured_in_training_counts_too():
    run = {"run_id": "r", "status": "FINISHED", "params.kind": "gpt", "experiment": "x"}
    run |= {f"metrics.gen/cfg{scale}/fid_lite0_160": 10 * scale for scale in (1.0, 1.5, 2.0)}
    run |= {"metrics.gen/cfg1.5/is_lite0_160": 7.0, "params.sampling/top_k": 0, "params.sampling/cfg_scale": 4.0}
    table = sampling_table(pd.DataFrame([run]))
    assert table["cfg_scale"].tolist() == [1.0, 1.5, 2.0]
    assert table["fid"].tolist() == [10, 15, 20]
    assert table["is"].tolist()[1] == 7


@pytest.mark.parametrize("select", SELECTORS)
def test_unfinished_runs_do_not_count(runs, select):
    assert select(runs.assign(status="RUNNING")).empty


@pytest.mark.parametrize("select", SELECTORS)
def test_an_empty_store_gives_an_empty_table_of_the_same_columns(runs, select):
    assert list(select(pd.DataFrame()).columns) == list(select(runs).columns)


def test_two_sizes_are_no_study(runs):
    assert scaling_table(runs[runs["params.model/dim"].isin([64, 512])]).empty


@pytest.mark.parametrize(
    ("value", "words"), [(1_969_920, "2.0M"), (110_888_448, "111M"), (3_096_659_200, "3.1B"), (900, "900")]
)
def test_short_numbers(value, words):
    assert short_number(value) == words
