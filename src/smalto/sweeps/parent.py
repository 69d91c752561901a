"""The MLflow run that the runs of a sweep belong to."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from smalto.analysis.runs import SWEEP_TAG, client
from smalto.files import write_bytes
from smalto.sweeps.names import PARENT

MEMORY = "mlflow_run_id"


class ParentRun:
    """Made once, by the process that launches: so the database exists before jobs meet there.

    A sweep that is continued goes on in the run it began.

    Args:
        node: config of the MLflow logger of the jobs.
        folder: of the sweep.
        tags: on a new run.
    """

    def __init__(self, node: DictConfig, folder: Path, tags: dict[str, str]) -> None:
        self._store = client(node.tracking_uri)
        known = self._store.get_experiment_by_name(node.experiment_name)
        experiment = (
            self._store.create_experiment(node.experiment_name, artifact_location=node.artifact_location)
            if known is None
            else known.experiment_id
        )
        memory = folder / MEMORY
        run_id = memory.read_text().strip() if memory.exists() else None
        if run_id is None or not self._exists(run_id):
            name = f"sweep-{folder.name}"
            run_id = self._store.create_run(experiment, run_name=name, tags=tags | {SWEEP_TAG: str(folder)}).info.run_id
            write_bytes(memory, f"{run_id}\n".encode())
        self.run_id = run_id
        self._memory = memory
        self._store.update_run(run_id, status="RUNNING")
        os.environ[PARENT] = run_id

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return self._store.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException:  # another database than when the sweep began
            return False

    def close(self, status: str, counts: dict[str, int], table: str) -> None:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            counts: jobs by status.
            table: of the jobs.
        """
        for key, value in counts.items():
            self._store.log_metric(self.run_id, f"jobs/{key.replace(' ', '_')}", value)
        self._store.log_text(self.run_id, table, "sweep.txt")
        self._store.set_terminated(self.run_id, status)

    def forget(self) -> None:
        """Remove the run of a sweep that never began."""
        self._store.delete_run(self.run_id)
        self._memory.unlink(missing_ok=True)


def mlflow_node(config: Any) -> DictConfig | None:
    """The MLflow logger that the jobs will have, if any."""
    nodes = (config.get("logger") or {}).values()
    return next((node for node in nodes if node and str(node.get("_target_")).endswith("MLFlowLogger")), None)
