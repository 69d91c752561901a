"""Training recorded in MLflow: what the store does never ends or delays it, and nothing is lost."""

import os
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from smalto.files import write_bytes
from smalto.redact import MARK

MEMORY, WAITING = "mlflow_run_id", "mlflow_waiting.jsonl"
"""Files in the folder of a run: its id in MLflow, and what MLflow does not have yet."""


class MLFlowLogger(Logger):
    """One run of MLflow, for one folder. Entries go to a file at once and from there to the store, in a thread.

    A run that is continued goes on where it was in MLflow. If it is gone there, or was deleted, a new one begins. Every
    process of a run makes a logger, the first one logs.

    Args:
        experiment_name: of the experiment, made if missing.
        run_name: of a new run.
        tracking_uri: of the store.
        artifact_location: where a new experiment in a database has its files: ``outputs/mlruns/NAME``.
        tags: of a new run; None for those that are not there.
        folder: of the run.
    """

    def __init__(
        self,
        *,
        experiment_name: str,
        run_name: str,
        tracking_uri: str,
        artifact_location: str,
        folder: str | Path,
        tags: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._experiment_name = experiment_name
        self._run_name = run_name
        self._uri = tracking_uri
        self._place = artifact_location
        self._tags = tags or {}
        self._recorder: Any = None

    @property
    def name(self) -> str:
        """Of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """Id of the run, once it has one."""
        return None if self._recorder is None else self._recorder.journal.run_id

    @property
    def recorder(self) -> Any:
        """What takes the entries, see :class:`Recorder`."""
        if self._recorder is None:
            self._recorder = recorder_of(
                self.folder, self._uri, self._place, self._experiment_name, self._run_name, self._tags
            )
        return self._recorder

    @rank_zero_only
    def begin(self, tags: dict[str, Any]) -> None:
        """Find or make the run, within seconds; if the store fails, say so once and go on.

        Args:
            tags: for this run, new or continued.
        """
        self.recorder.begin()
        self.log_tags(tags)

    @rank_zero_only
    def log_tags(self, tags: dict[str, Any]) -> None:
        """Texts that say what the run is."""
        from smalto.analysis.entries import texts

        if known := texts(tags):
            self.recorder.add({"tags": known}, origin=True)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """All settings, flat: ``model/dim``."""
        from smalto.analysis.entries import parameters

        self.recorder.add(parameters(_flatten_dict(_convert_params(params)), 250), origin=True)

    @rank_zero_only
    def log_text(self, text: str, file: str) -> None:
        """A file that says what the run is."""
        self.recorder.add({"text": text, "file": file}, origin=True)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of a step."""
        from smalto.analysis.entries import measured

        if metrics:
            self.recorder.add(measured(dict(metrics), step or 0))

    @rank_zero_only
    def log_picture(self, path: Path, name: str, step: int) -> None:
        """A picture that lies in the run folder, under a name with a slider over steps."""
        self.recorder.add({"image": str(path.absolute()), "key": name, "step": step})

    @rank_zero_only
    def mark(self, status: str) -> None:
        """RUNNING, FINISHED, FAILED or KILLED."""
        from smalto.analysis.entries import ended

        self.recorder.add(ended(status), origin=status == "RUNNING")

    @rank_zero_only
    def save(self) -> None:
        """What was logged so far lasts, with a checkpoint that leaves it behind."""
        self.recorder.journal.save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Note the end and wait for what is on its way."""
        self.mark("FINISHED" if status in ("success", "finished") else "FAILED")
        self.recorder.close()


def recorder_of(folder: Path, uri: str, place: str, experiment: str, run_name: str, tags: Mapping[str, Any]) -> Any:
    """The recorder of the run, or of the sweep, in ``folder``: goes on in the run that began there.

    Args:
        folder: of the run.
        uri: of the store; one that was written down without its password is taken from the environment.
        place: of the files of a new experiment.
        experiment: name.
        run_name: of a new run.
        tags: of a new run.
    """
    # Seconds of import, only where they are wanted.
    from smalto.analysis.journal import Journal, header
    from smalto.analysis.recorder import Recorder, place_of

    memory = folder / MEMORY
    known = ""
    with suppress(OSError):
        known = memory.read_text(errors="replace").strip()

    def remember(run_id: str) -> None:
        if run_id != known:
            write_bytes(memory, f"{run_id}\n".encode())

    if MARK in uri:
        uri = os.environ.get("MLFLOW_TRACKING_URI", uri)
    top = header(experiment, run_name, artifact_location=place_of(uri, place), tags=dict(tags))
    journal = Journal(folder / WAITING, top, run_id=known or None, on_begin=remember)
    return Recorder(journal, uri, Path(place).parent.parent, later="the same command writes it, finished or not")


def mlflow_node(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The MLflow logger of a config of ``train``, if it has one; before it was ours it was Lightning's."""
    nodes = (config.get("logger") or {}).values()
    return next((node for node in nodes if node and str(node.get("_target_")).endswith("MLFlowLogger")), None)


def deliver_waiting(folder: Path, config: Mapping[str, Any]) -> None:
    """Bring to MLflow what the run in ``folder``, which is over, could not record.

    Args:
        folder: of the run.
        config: its own.
    """
    node = mlflow_node(config)
    if node is not None and (folder / WAITING).exists():
        from smalto.analysis.recorder import is_left_alone

        names = node["experiment_name"], node["run_name"]
        if not is_left_alone(node["tracking_uri"]):
            recorder_of(folder, node["tracking_uri"], node["artifact_location"], *names, node.get("tags") or {}).close()
