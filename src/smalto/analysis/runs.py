"""MLflow: all runs as a table."""

import json
from collections.abc import Iterable
from typing import Any

import pandas as pd
from mlflow import MlflowClient

from smalto.analysis.store import prepare_database, sqlite_file

WORDS = {"True": True, "False": False, "None": None}
"""MLflow stores parameters as Python prints them."""


SWEEP_TAG = "smalto.sweep_folder"
"""On the parent run of a sweep, which trained nothing itself."""


def client(tracking_uri: str) -> MlflowClient:
    """A client to read from a tracking store; the database of a file is made if it is missing."""
    file = sqlite_file(tracking_uri)
    if file is not None and not file.exists():
        prepare_database(file)
    return MlflowClient(tracking_uri)


def runs_table(tracking_uri: str, experiments: list[str] | None = None, *, step_of: str | None = None) -> pd.DataFrame:
    """One row per run, newest first: ``run_id, experiment, name, status``, ``params.*``, ``metrics.*``, ``tags.*``.

    Args:
        tracking_uri: for instance ``sqlite:///outputs/mlflow.db``.
        experiments: names; None takes all.
        step_of: a metric; column ``step`` is then where each run logged it last. One request per run that has it.

    Parents of sweeps are left out. Parameters that are numbers, lists, booleans or None come back as such.
    """
    store = client(tracking_uri)
    known = {e.experiment_id: e.name for e in store.search_experiments()}
    wanted = [i for i, name in known.items() if experiments is None or name in experiments]
    rows = []
    token: str | None = None
    while wanted:
        page = store.search_runs(wanted, page_token=token, max_results=1000)
        for run in page:
            if SWEEP_TAG in run.data.tags:
                continue
            row = {
                "run_id": run.info.run_id,
                "experiment": known[run.info.experiment_id],
                "name": run.info.run_name,
                "status": run.info.status,
            }
            if step_of in run.data.metrics:
                row["step"] = max(point.step for point in store.get_metric_history(run.info.run_id, step_of))
            row |= {f"params.{key}": _parsed(value) for key, value in run.data.params.items()}
            row |= {f"metrics.{key}": value for key, value in run.data.metrics.items()}
            row |= {f"tags.{key}": value for key, value in run.data.tags.items()}
            rows.append(row)
        token = page.token
        if not token:
            break
    return pd.DataFrame(rows)


def curves(tracking_uri: str, run_ids: Iterable[str], metric: str) -> pd.DataFrame:
    """The history of a metric: ``run_id, step, value``, steps ascending within a run, runs in the order given.

    A run that was killed and continued from an earlier checkpoint logs some steps twice; the newest value counts.
    Runs without the metric have no rows.
    """
    store = client(tracking_uri)
    rows = [
        (run_id, point.step, point.value, point.timestamp)
        for run_id in run_ids
        for point in store.get_metric_history(run_id, metric)
    ]
    table = pd.DataFrame(rows, columns=["run_id", "step", "value", "timestamp"])
    newest = table.sort_values("timestamp", kind="stable").drop_duplicates(["run_id", "step"], keep="last")
    order = {run_id: i for i, run_id in enumerate(table["run_id"].unique())}
    newest = newest.sort_values(["run_id", "step"], key=lambda c: c.map(order) if c.name == "run_id" else c)
    return newest.drop(columns="timestamp").reset_index(drop=True)


def _parsed(text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
