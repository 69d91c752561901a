from mlflow.entities import Metric

from smalto.analysis.runs import client, curves, runs_table


def logged(store, run_id: str, points: list[tuple[int, float, int]]) -> None:
    metrics = [Metric("val/loss", value, timestamp, step) for step, value, timestamp in points]
    client(f"sqlite:///{store}").log_batch(run_id, metrics=metrics)


def test_parameters_come_back_as_what_they_were(store_uri):
    run = runs_table(store_uri, ["scaling"]).iloc[0]
    assert run["params.model/code_shape"] == [[8, 8]]
    assert run["params.model/num_kv_heads"] is None
    assert run["params.model/num_layers"] == 2
    assert run["tags.sweep"] == "scaling"
    assert run["status"] == "FINISHED"


def test_only_the_experiments_asked_for(store_uri):
    assert set(runs_table(store_uri, ["scaling", "other"])["experiment"]) == {"scaling", "other"}
    assert runs_table(store_uri, ["unknown"]).empty


def test_curves_of_a_continued_run_hold_every_step_once(tmp_path):
    store = tmp_path / "mlflow.db"
    api = client(f"sqlite:///{store}")
    experiment = api.create_experiment("x", artifact_location=str(tmp_path))
    killed, straight, empty = (api.create_run(experiment).info.run_id for _ in range(3))
    # Killed after step 30, continued from a checkpoint of step 15.
    logged(store, killed, [(10, 3.0, 100), (20, 2.5, 200), (30, 2.4, 300)])
    logged(store, killed, [(20, 2.2, 500), (30, 2.1, 600), (40, 2.0, 700)])
    logged(store, straight, [(20, 1.0, 150), (10, 1.5, 50)])
    table = curves(f"sqlite:///{store}", [straight, killed, empty], "val/loss")
    assert list(table.columns) == ["run_id", "step", "value"]
    assert table["run_id"].tolist() == [straight] * 2 + [killed] * 4
    assert table["step"].tolist() == [10, 20, 10, 20, 30, 40]
    assert table["value"].tolist() == [1.5, 1.0, 3.0, 2.2, 2.1, 2.0]
    assert curves(f"sqlite:///{store}", [empty], "val/loss").empty
    steps = runs_table(f"sqlite:///{store}", step_of="val/loss").set_index("run_id")["step"]
    assert (steps[killed], steps[straight], steps.isna()[empty]) == (40, 20, True)
