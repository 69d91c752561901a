import pandas as pd
import pytest

from smalto.analysis.scaling import GPTShape
from smalto.analysis.shown import bundled_file, metric_curves, read_csv, shown, write_csv
from smalto.analysis.tables import codebook_table, scaling_table


def test_mlflow_comes_first_then_the_bundled_file(store_uri, tmp_path):
    table = pd.DataFrame({"run_id": ["x"], "loss": [1.5]})
    write_csv(table, tmp_path / "runs.csv", origin="two lines\nof origin")
    curves = pd.DataFrame({"run_id": ["x"], "metric": ["val/loss"], "step": [3], "value": [2.5]})
    write_csv(curves, tmp_path / "curves.csv", origin="origin")

    own = shown(scaling_table, tmp_path / "runs.csv", tracking_uri=store_uri)
    assert own.origin.startswith("MLflow: 4 rows")
    assert metric_curves(own, "train/loss", tmp_path / "curves.csv")["value"].tolist() == [3.1, 2.6, 2.35, 2.225]

    missing = tmp_path / "none" / "mlflow.db"
    spare = shown(scaling_table, tmp_path / "runs.csv", tracking_uri=f"sqlite:///{missing}")
    assert spare.origin.startswith("bundled file runs.csv")
    assert spare.origin.endswith("two lines of origin")
    pd.testing.assert_frame_equal(spare.table, table)
    assert metric_curves(spare, "val/loss", tmp_path / "curves.csv")["value"].tolist() == [2.5]
    assert not missing.parent.exists()  # looking is not making

    nothing = shown(codebook_table, None, tracking_uri=f"sqlite:///{missing}")
    assert nothing.table.empty
    assert nothing.origin.startswith("none")


def test_a_table_without_an_origin_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="where it is from"):
        read_csv(tmp_path / "x.csv")


def test_the_papers_models_are_those_of_the_configs():
    models, _ = read_csv(bundled_file("paper_models.csv"))
    for row in models.to_dict("records"):
        name, parameters = row.pop("model"), row.pop("parameters")
        assert GPTShape(**row).parameters == parameters
        config = (bundled_file("").parent.parent / "conf" / "model" / f"{name.lower()}.yaml").read_text()
        for key in ("dim", "num_layers", "num_heads"):
            assert f"{key}: {row[key]}\n" in config
