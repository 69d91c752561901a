"""The MLflow run that the runs of a sweep belong to."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smalto.analysis.entries import ended, measured
from smalto.analysis.runs import SWEEP_TAG
from smalto.callbacks.mlflow_logger import MEMORY, recorder_of
from smalto.sweeps.names import PARENT


class ParentRun:
    """Made once, by the process that launches: so the database exists before jobs meet there.

    A sweep that is continued goes on in the run it began. If MLflow fails the sweep runs all the same, and its jobs
    have no parent there.

    Args:
        node: config of the MLflow logger of the jobs.
        folder: of the sweep.
        tags: on a new run.
    """

    def __init__(self, node: Mapping[str, Any], folder: Path, tags: dict[str, str]) -> None:
        self._folder = folder
        names = node["experiment_name"], f"sweep-{folder.name}"
        tags = tags | {SWEEP_TAG: str(folder)}
        self._recorder = recorder_of(folder, node["tracking_uri"], node["artifact_location"], *names, tags)
        self._recorder.add(ended("RUNNING"))
        self._recorder.begin()
        if self.run_id is not None:
            os.environ[PARENT] = self.run_id

    @property
    def run_id(self) -> str | None:
        """In MLflow, once it is there."""
        return self._recorder.journal.run_id

    def close(self, status: str, counts: dict[str, int], table: str) -> None:
        """End the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            counts: jobs by status.
            table: of the jobs.
        """
        numbers = {f"jobs/{key.replace(' ', '_')}": float(value) for key, value in counts.items()}
        # A number is written once a step; a sweep that goes on counts its jobs anew.
        self._recorder.add(measured(numbers, step=int(1000 * time.time())))
        self._recorder.add({"text": table, "file": "sweep.txt"})
        self._recorder.add(ended(status))
        self._recorder.close()

    def forget(self) -> None:
        """Remove the run of a sweep that never began."""
        self._recorder.forget()
        (self._folder / MEMORY).unlink(missing_ok=True)
