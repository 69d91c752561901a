"""``smalto train`` and MLflow: whatever the store does, training ends as without it, and every value is there once."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from smalto import train
from smalto.analysis import recorder, store
from smalto.analysis.runs import SWEEP_TAG, curves
from smalto.callbacks.mlflow_logger import MEMORY, WAITING
from smalto.runtime import compose, record_summary
from smalto.sweeps.names import PARENT
from smalto.sweeps.parent import ParentRun
from stores import database
from test_train import SYNTHETIC

STEPS = [*(option for option in SYNTHETIC if option != "logger=csv"), "trainer.log_every_n_steps=1"]


def config(outputs: Path, *overrides: str):
    return compose("train", [*STEPS, f"paths.outputs={outputs}", f"run_dir={outputs}/run", *overrides])


@pytest.fixture(autouse=True)
def _own_store(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(recorder, "_failed", {})
    monkeypatch.setattr(store, "CHECK_SECONDS", 1)


def steps(client: MlflowClient, run_id: str, key: str = "train/loss") -> list[int]:
    return sorted(point.step for point in client.get_metric_history(run_id, key))


def the_run(uri: str):
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("train").experiment_id])
    return client, run


def test_a_run_is_recorded_whole(tmp_path):
    uri = database(tmp_path)
    metrics = train.run(config(tmp_path))
    client, run = the_run(uri)
    assert (run.info.status, run.info.run_id) == ("FINISHED", (tmp_path / "run" / MEMORY).read_text().strip())
    assert run.data.metrics["val/loss"] == pytest.approx(metrics["val/loss"])
    assert {"sweep", "ablation"} & set(run.data.tags) == set()
    assert run.data.tags["commit"]
    assert run.data.params["model/dim" if "model/dim" in run.data.params else "task/net/dim"] == "32"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert steps(client, run.info.run_id, "val/loss") == [2, 5]
    assert not (tmp_path / "run" / WAITING).exists()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("fault", ["absent", *(pytest.param(each, marks=SLOW) for each in ("no database", "locked"))])
def test_a_store_that_cannot_be_used_costs_one_warning_and_is_written_later(tmp_path, capfd, monkeypatch, fault):
    uri = database(tmp_path)
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    if fault == "absent":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://joe:swordfish@127.0.0.1:9")
    elif fault == "no database":
        (tmp_path / "mlflow.db").write_bytes(b"x" * 9999)
    else:
        holder.execute("BEGIN EXCLUSIVE")
    capfd.readouterr()
    metrics = train.run(config(tmp_path))
    assert metrics["val/loss"] > 0
    told = (tmp_path / "run" / "train.log").read_text()
    assert told.count("The work goes on") == 1
    assert told.count("keeps what MLflow does not have yet") == 1  # at the end
    assert len(told.splitlines()) < 6
    assert "Traceback" not in capfd.readouterr().err
    holder.close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if fault == "no database":
        shutil.copy(database(tmp_path / "other").removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    recorder._failed.clear()
    written = "".join(file.read_text(errors="replace") for file in (tmp_path / "run").glob("mlflow*"))
    assert "swordfish" not in written
    assert train.run(config(tmp_path)) == metrics  # finished already
    client, run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert steps(client, run.info.run_id, "val/loss") == [2, 5]
    assert run.data.metrics["val/loss"] == pytest.approx(metrics["val/loss"])
    assert not (tmp_path / "run" / WAITING).exists()


def stopped_half_way(tmp_path, monkeypatch) -> None:
    from smalto.tasks.gpt import GPTTask

    whole = GPTTask.training_step

    def stop(self, batch, index):
        if self.global_step == 4:
            raise KeyboardInterrupt
        return whole(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(GPTTask, "training_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.run(config(tmp_path))


def test_a_database_that_is_locked_in_the_middle_holds_up_nothing(tmp_path, monkeypatch):
    """Its lock may last for minutes; SQLite is asked in a thread, for as long as MLflow has it wait."""
    from smalto.tasks.gpt import GPTTask

    uri, whole = database(tmp_path), GPTTask.training_step
    holder = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None, check_same_thread=False)

    def lock(self, batch, index):
        if self.global_step == 2:
            holder.execute("BEGIN EXCLUSIVE")
        return whole(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(GPTTask, "training_step", lock)
        patch.setattr(recorder, "PATIENCE", 0.5)
        metrics = train.run(config(tmp_path))
    assert (tmp_path / "run" / "metrics.json").exists()
    assert (tmp_path / "run" / WAITING).exists()
    holder.close()
    assert train.run(config(tmp_path)) == metrics
    client, run = the_run(uri)
    assert run.info.status == "FINISHED"
    assert steps(client, run.info.run_id) == list(range(6))
    assert not (tmp_path / "run" / WAITING).exists()


@pytest.mark.parametrize("gone", ["run", *(pytest.param(each, marks=SLOW) for each in ("experiment", "nothing"))])
def test_a_run_that_was_deleted_in_mlflow_goes_on_as_a_new_one(tmp_path, monkeypatch, gone):
    uri = database(tmp_path)
    stopped_half_way(tmp_path, monkeypatch)
    client, old = the_run(uri)
    if gone == "run":
        client.delete_run(old.info.run_id)
    elif gone == "experiment":
        client.delete_experiment(old.info.experiment_id)
    assert train.run(config(tmp_path))["val/loss"] > 0
    client, run = the_run(uri)
    assert (tmp_path / "run" / MEMORY).read_text().strip() == run.info.run_id
    assert (run.info.run_id == old.info.run_id) == (gone == "nothing")
    told = (tmp_path / "run" / "train.log").read_text()
    assert ("was deleted there: it goes on as run" in told) == (gone != "nothing")
    assert (run.info.status, "commit" in run.data.tags, "seed" in run.data.params) == ("FINISHED", True, True)
    assert steps(client, run.info.run_id, "val/loss") == ([2, 5] if gone == "nothing" else [5])


def test_a_run_begun_with_lightnings_logger_goes_on(tmp_path):
    uri = database(tmp_path)
    plain = config(tmp_path)
    plain.logger.mlflow = {
        **plain.logger.mlflow,
        "_target_": "lightning.pytorch.loggers.MLFlowLogger",
        "log_model": False,
        "tags": {"sweep": None, "ablation": None},
    }
    client = MlflowClient(uri)
    run_id = client.create_run(
        client.create_experiment("train", artifact_location=f"{tmp_path}/mlruns/train")
    ).info.run_id
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MEMORY).write_text(f"{run_id}\n")
    train.run(plain)
    client, run = the_run(uri)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")


# --- other work -----------------------------------------------------------------------------------------


def test_a_sweep_goes_on_without_its_parent_which_is_recorded_later(tmp_path, monkeypatch):
    node = {"experiment_name": "x", "tracking_uri": "http://127.0.0.1:9", "artifact_location": f"{tmp_path}/mlruns/x"}
    monkeypatch.delenv(PARENT, raising=False)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    parent = ParentRun(node, sweep, {"command": "smalto train -m"})
    assert (parent.run_id, PARENT in os.environ) == (None, False)
    parent.close("FAILED", {"not run": 1, "finished": 2}, "table")
    node["tracking_uri"] = database(tmp_path)
    again = ParentRun(node, sweep, {"command": "smalto train -m"})
    assert os.environ.pop(PARENT) == again.run_id == (sweep / MEMORY).read_text().strip()
    again.close("FINISHED", {"finished": 3}, "table")
    client = MlflowClient(node["tracking_uri"])
    (run,) = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert (run.info.run_id, run.info.status) == (again.run_id, "FINISHED")
    assert run.data.metrics == {"jobs/not_run": 1, "jobs/finished": 3}
    assert run.data.tags[SWEEP_TAG] == str(sweep)


def test_a_sweep_that_never_began_leaves_no_run(tmp_path, monkeypatch):
    uri = database(tmp_path)
    for address in (uri, "http://127.0.0.1:9"):
        node = {"experiment_name": "x", "tracking_uri": address, "artifact_location": f"{tmp_path}/mlruns/x"}
        ParentRun(node, tmp_path, {}).forget()
        assert not list(tmp_path.glob("mlflow_*"))
    monkeypatch.delenv(PARENT, raising=False)
    client = MlflowClient(uri)
    assert not client.search_runs([client.get_experiment_by_name("x").experiment_id])


def test_the_same_command_records_what_it_could_not_before(tmp_path, monkeypatch):
    """Also when its data is complete already."""
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    prepare = compose("prepare", ["source=folder", "source.path=x", f"out={tmp_path}"])
    (tmp_path / "meta.json").write_text("{}")
    record_summary(prepare, "prepare", {"status": "written", "out": str(tmp_path), "num_train": 3})
    assert len(list(tmp_path.glob("mlflow_pending/*"))) == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database(tmp_path))
    for _ in range(2):
        record_summary(prepare, "prepare", {"status": "reused", "out": str(tmp_path), "num_train": 3})
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("prepare").experiment_id])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"num_train": 3})
    assert run.data.params["source"]


# --- a server, on this machine --------------------------------------------------------------------------


class Server:
    """``mlflow server`` on a free port, with a database and artifacts in a folder."""

    def __init__(self, folder: Path) -> None:
        import socket

        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        database(folder)

    def start(self) -> None:
        place = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/mlflow.db",
            "--artifacts-destination",
            self.folder / "a",
        ]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        with (self.folder / "log").open("a") as log:
            command = [sys.executable, "-m", "mlflow", "server", *place, *options]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        end = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                assert time.monotonic() < end, (self.folder / "log").read_text()
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture
def server(tmp_path):
    one = Server(tmp_path / "server")
    yield one
    one.kill()


def commanded(outputs: Path, uri: str, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"SMALTO_OUTPUTS": str(outputs), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "smalto", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["there", "killed in the middle", "killed and back", "absent at the start"])
def test_a_training_beside_a_real_server(tmp_path, server, when):
    """All values are there once, whatever happened to the server, and the command ends as without it."""
    outputs, folder = tmp_path / "outputs", tmp_path / "outputs" / "run"
    count = 3000 if when == "killed and back" else 400  # it takes the server seconds to be back
    options = [*STEPS, f"trainer.max_steps={count}", "trainer.val_check_interval=100", "data.num_train=1600"]
    command = ["train", *options, f"hydra.run.dir={folder}", "callbacks.checkpoint.every_n_steps=50"]
    if when != "absent at the start":
        server.start()
    process = commanded(outputs, server.uri, *command)
    if when.startswith("killed"):
        end = time.monotonic() + 200
        while not list(folder.glob("checkpoints/step_*.ckpt")):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.01)
        server.kill()
        if when == "killed and back":
            server.start()
    text = process.communicate(timeout=250)[0]
    assert process.returncode == 0, text
    assert "Traceback" not in text
    assert text.count("The work goes on") == (when != "there")
    assert text.count("MLflow answers again") == (when == "killed and back")
    assert (folder / "metrics.json").exists()
    if server.process is None:
        assert (folder / WAITING).exists()
        server.start()
        again = commanded(outputs, server.uri, *command)
        assert "finished already" in again.communicate(timeout=100)[0]
    assert not (folder / WAITING).exists()
    client, run = the_run(server.uri)
    assert run.info.status == "FINISHED"
    for key, wanted in (("val/loss", list(range(99, count, 100))), ("train/loss", list(range(count)))):
        assert steps(client, run.info.run_id, key) == wanted, (when, key)
    assert len(curves(server.uri, [run.info.run_id], "train/loss")) == count
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.yaml"]
    assert list((server.folder / "a").rglob("config.yaml"))
    assert not (outputs / "mlruns").exists()  # a server has its own place


@pytest.mark.slow
def test_a_finished_job_beside_an_absent_server_is_recorded_by_the_same_command(tmp_path, server):
    outputs = tmp_path / "outputs"
    command = ["prepare", "source=fashion_mnist", "limit=20", f"out={outputs}/data", "workers=0"]
    began = time.monotonic()
    process = commanded(outputs, server.uri, *command)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 0, text
    assert time.monotonic() - began < 90
    assert text.count("the next command writes it") == 1
    assert "Traceback" not in text
    server.start()
    for _ in range(2):
        process = commanded(outputs, server.uri, *command)
        assert "complete already" in process.communicate(timeout=200)[0]
        client = MlflowClient(server.uri)
        (run,) = client.search_runs([client.get_experiment_by_name("prepare").experiment_id])
        assert run.info.status == "FINISHED"
        assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["meta.json"]
    assert not (outputs / "mlflow_pending").exists()
