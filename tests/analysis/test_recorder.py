"""Nothing that a store does ends, delays or loses what is recorded: each entry is there once, in the end."""

import json
import logging
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.store.tracking.rest_store import RestStore
from PIL import Image

from smalto.analysis import recorder as recorders
from smalto.analysis.entries import ended, measured, parameters, texts
from smalto.analysis.journal import Journal, header, write_lines
from smalto.analysis.recorder import Recorder, record_job, write_pending
from stores import Flaky, database


@pytest.fixture(autouse=True)
def _fresh(monkeypatch) -> None:
    monkeypatch.setattr(recorders, "_failed", {})


@pytest.fixture
def flaky(tmp_path, monkeypatch) -> Flaky:
    """The store of every recorder of the test."""
    client = Flaky(MlflowClient(database(tmp_path / "outputs")))
    monkeypatch.setattr(recorders, "connect", lambda uri, outputs: client.search_experiments() and client)
    monkeypatch.setattr(recorders, "FIRST_PAUSE", 0.05)
    return client


def recorder(folder: Path, run_id: str | None = None, begun: list[str] | None = None) -> Recorder:
    top = header("x", "name", artifact_location=f"{folder}/mlruns/x", tags={"sweep": None, "kind": "gpt"})
    hear = (lambda run: None) if begun is None else begun.append
    journal = Journal(folder / "waiting.jsonl", top, run_id=run_id, on_begin=hear)
    return Recorder(journal, "sqlite:///there", folder, later="again")


def runs(client: Flaky, experiment: str = "x", view: int = ViewType.ACTIVE_ONLY) -> list:
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id], run_view_type=view))


def history(client: Flaky, run_id: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, "loss"))


def eventually(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- a run that goes on for long ----------------------------------------------------------------------


def test_everything_arrives_and_no_file_stays(flaky, tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "sheet.png")
    one = recorder(tmp_path)
    assert one.begin()
    one.add(parameters({"lr": 0.1, "url": "http://joe:swordfish@x/y"}, 250), origin=True)
    for step in range(5):
        one.add(measured({"loss": step / 2}, step))
    one.add({"image": str(tmp_path / "sheet.png"), "key": "sheet", "step": 3})
    one.add({"text": "a: 1", "file": "config.yaml"})
    one.add(ended("FINISHED"))
    assert one.close()
    (run,) = runs(flaky)
    assert history(flaky, run.info.run_id) == [(step, step / 2) for step in range(5)]
    assert (run.info.status, run.info.run_name, run.data.tags["kind"]) == ("FINISHED", "name", "gpt")
    assert run.data.params == {"lr": "0.1", "url": "http://***@x/y"}
    assert {file.path for file in flaky.list_artifacts(run.info.run_id)} == {"config.yaml", "images"}
    assert not (tmp_path / "waiting.jsonl").exists()


def test_a_store_that_is_down_at_first_gets_everything_later(flaky, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    flaky.down = True
    one = recorder(tmp_path)
    assert not one.begin()
    for step in range(200):
        one.add(measured({"loss": 1.0}, step))
    eventually(lambda: flaky.calls.count("search_experiments") > 2)  # it is tried again, not at every step
    assert len(flaky.calls) < 50
    assert len((tmp_path / "waiting.jsonl").read_text().splitlines()) == 201
    flaky.down = False
    eventually(lambda: not one.journal.waiting)
    assert one.close()
    (run,) = runs(flaky)
    assert [step for step, _ in history(flaky, run.info.run_id)] == list(range(200))
    assert flaky.calls.count("log_batch") < 10  # rows go together
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "The work goes on" in warnings[0].message
    assert "MLflow answers again" in caplog.text


def test_a_process_that_was_killed_loses_nothing_and_the_next_doubles_nothing(flaky, tmp_path):
    begun: list[str] = []
    one = recorder(tmp_path, begun=begun)
    one.begin()
    one.add(measured({"loss": 1.0}, 1))
    eventually(lambda: not one.journal.waiting)
    flaky.lose = "log_batch"  # it arrives, but nobody here knows
    one.add(measured({"loss": 2.0}, 2))
    eventually(lambda: not flaky.lose)
    flaky.down = True
    one.add(measured({"loss": 3.0}, 3))
    with (tmp_path / "waiting.jsonl").open("a") as file:
        file.write('{"metrics": [["loss", 4.')  # killed while it wrote
    left = (tmp_path / "waiting.jsonl").read_text()
    one.journal.discard()  # its thread goes with it
    flaky.down = False
    (tmp_path / "waiting.jsonl").write_text(left)
    again = recorder(tmp_path, run_id=begun[-1])
    again.add(measured({"loss": 4.0}, 4))
    assert again.close()
    assert history(flaky, begun[0]) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(runs(flaky)) == 1


def test_a_run_whose_making_was_not_confirmed_is_found_again(flaky, tmp_path):
    flaky.lose = "create_run"
    one = recorder(tmp_path)
    one.add(measured({"loss": 1.0}, 1))
    eventually(lambda: not one.journal.waiting)
    one.close()
    assert len(runs(flaky)) == 1


def test_what_the_store_refuses_for_good_holds_up_nothing(flaky, tmp_path, caplog):
    one = recorder(tmp_path)
    one.add(parameters({"devices": 1, "lr": 0.1}, 250))
    one.add(parameters({"devices": 8, "seed": 0}, 250))  # a continued run may compute elsewhere
    now = int(time.time() * 1000)
    one.add({"metrics": [["loss", 1.0, now, 1], ["a" * 999, 2.0, now, 1], ["x", 3.0, now, 1]]})
    one.add({"artifact": str(tmp_path / "gone.txt")})
    one.add({"image": str(tmp_path / "gone.png"), "key": "sheet", "step": 3})
    one.add(ended("FINISHED"))
    assert one.close()
    (run,) = runs(flaky)
    assert run.data.params == {"devices": "1", "lr": "0.1", "seed": "0"}
    assert run.data.metrics == {"loss": 1.0, "x": 3.0}
    assert run.info.status == "FINISHED"
    assert "aaa" in caplog.text
    assert "gone.txt" in caplog.text


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_in_the_page_meanwhile_is_begun_anew(flaky, tmp_path, what, caplog):
    begun: list[str] = []
    one = recorder(tmp_path, begun=begun)
    one.begin()
    one.add(parameters({"lr": 0.1}, 250), origin=True)
    one.add(measured({"loss": 1.0}, 1))
    eventually(lambda: not one.journal.waiting)
    (run,) = runs(flaky)
    if what == "run":
        flaky.delete_run(run.info.run_id)
    else:
        flaky.delete_experiment(run.info.experiment_id)
    one.add(measured({"loss": 2.0}, 2))
    assert one.close()
    (new,) = runs(flaky)
    assert [new.info.run_id] == begun[1:]
    assert (new.data.params, history(flaky, new.info.run_id)) == ({"lr": "0.1"}, [(2, 2.0)])
    assert f"run {run.info.run_id} is not in MLflow, or was deleted there: it goes on as" in caplog.text
    assert flaky.get_run(run.info.run_id).info.lifecycle_stage == "deleted"


def test_a_store_that_hangs_delays_nothing(tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr(recorders, "connect", lambda uri, outputs: over.wait(60))
    monkeypatch.setattr(recorders, "PATIENCE", 0.1)
    one = recorder(tmp_path)
    began = time.monotonic()
    one.begin()
    for step in range(100):
        one.add(measured({"loss": 1.0}, step))
    assert not one.close()
    assert time.monotonic() - began < 2
    assert len((tmp_path / "waiting.jsonl").read_text().splitlines()) == 101
    hanging = one._thread
    one.journal.discard()
    over.set()
    hanging.join(20)


def test_a_full_disk_and_a_store_that_is_down_end_nothing(flaky, tmp_path):
    (tmp_path / "waiting.jsonl").mkdir()  # nothing can be read or written there
    flaky.down = True
    one = recorder(tmp_path)
    one.add(measured({"loss": 1.0}, 1))
    flaky.down = False
    eventually(lambda: not one.journal.waiting)
    assert len(runs(flaky)) == 1


def test_tags_are_what_a_server_takes(monkeypatch):
    """The REST client makes protobuf messages of them, in which None is a TypeError."""
    sent = []

    def catch(self, api, body, *args, **kwargs):
        sent.append(json.loads(body))
        raise ConnectionError

    monkeypatch.setattr(RestStore, "_call_endpoint", catch)
    client = MlflowClient("http://127.0.0.1:9")
    given = {"sweep": None, "jobs": 3, "name": "x"}
    with pytest.raises(TypeError):
        client.create_run("0", tags=given)
    with pytest.raises(ConnectionError):
        client.create_run("0", tags=texts(given))
    tags = {tag["key"]: tag["value"] for tag in sent[0]["tags"]}
    assert (tags["jobs"], tags["name"], "sweep" in tags) == ("3", "x", False)


# --- jobs that are over -------------------------------------------------------------------------------


def job(outputs: Path, name: str = "a", **changes) -> dict:
    (outputs / "data").mkdir(parents=True, exist_ok=True)
    (outputs / "data" / "meta.json").write_text("{}")
    return {
        "experiment": "prepare",
        "run_name": name,
        "params": {"seed": 0},
        "metrics": {"images": 3.0},
        "tags": {"commit": None, "command": "smalto prepare"},
        "artifacts": [outputs / "data" / "meta.json"],
    } | changes


def test_a_job_that_could_not_be_recorded_is_recorded_by_the_next_once(flaky, tmp_path, caplog):
    outputs = tmp_path / "outputs"
    flaky.down = True
    record_job("sqlite:///there", outputs, **job(outputs, "a"))
    record_job("sqlite:///there", outputs, **job(outputs, "b"))  # at once: the store is not tried again
    assert flaky.calls == ["search_experiments"]
    assert len(caplog.records) == 1
    assert "the next command writes it" in caplog.text
    flaky.down = False
    recorders._failed.clear()
    record_job("sqlite:///there", outputs, **job(outputs, "c"))
    write_pending("sqlite:///there", outputs)
    found = runs(flaky, "prepare")
    assert sorted(run.info.run_name for run in found) == ["a", "b", "c"]
    for run in found:
        assert (run.info.status, run.data.metrics, run.data.params) == ("FINISHED", {"images": 3.0}, {"seed": "0"})
        assert run.data.tags["command"] == "smalto prepare"
        assert [file.path for file in flaky.list_artifacts(run.info.run_id)] == ["meta.json"]
    assert not (outputs / "mlflow_pending").exists()


@pytest.mark.parametrize("lost", ["create_run", "log_batch", "log_artifact", "set_terminated"])
def test_a_job_whose_recording_broke_off_is_not_recorded_twice(flaky, tmp_path, lost):
    outputs = tmp_path / "outputs"
    flaky.lose = lost
    record_job("sqlite:///there", outputs, **job(outputs))
    recorders._failed.clear()
    write_pending("sqlite:///there", outputs)
    (run,) = runs(flaky, "prepare")
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"images": 3.0})
    assert len(flaky.get_metric_history(run.info.run_id, "images")) == 1


def test_one_job_that_cannot_be_recorded_holds_up_no_other(flaky, tmp_path):
    outputs = tmp_path / "outputs"
    (outputs / "mlflow_pending").mkdir(parents=True)
    (outputs / "mlflow_pending" / "0-x.jsonl").write_text("nonsense\n")
    record_job("sqlite:///there", outputs, **job(outputs))
    assert len(runs(flaky, "prepare")) == 1
    assert [file.name for file in (outputs / "mlflow_pending").iterdir()] == ["0-x.jsonl"]


def test_jobs_that_end_at_once_are_recorded_once_each(flaky, tmp_path):
    outputs = tmp_path / "outputs"
    threads = [
        threading.Thread(target=record_job, args=("sqlite:///there", outputs), kwargs=job(outputs, str(number)))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    write_pending("sqlite:///there", outputs)
    assert sorted(run.info.run_name for run in runs(flaky, "prepare")) == ["0", "1", "2", "3"]


def test_a_job_whose_files_lie_elsewhere_has_them_recorded(flaky, tmp_path):
    outputs = tmp_path / "outputs"
    elsewhere = tmp_path / "data" / "meta.json"
    elsewhere.parent.mkdir()
    elsewhere.write_text("{}")
    flaky.down = True
    record_job("sqlite:///there", outputs, **job(outputs, artifacts=[elsewhere]))
    flaky.down = False
    recorders._failed.clear()
    write_pending("sqlite:///there", outputs)
    (run,) = runs(flaky, "prepare")
    assert [file.path for file in flaky.list_artifacts(run.info.run_id)] == ["meta.json"]
    assert not (outputs / "mlflow_pending").exists()


def test_a_planted_journal_hands_out_nothing_and_leads_nowhere(flaky, tmp_path, caplog):
    outputs, secret = tmp_path / "outputs", tmp_path / "id_rsa"
    pending = outputs / "mlflow_pending"
    pending.mkdir(parents=True)
    secret.write_text("secret")
    (outputs / "link").symlink_to(secret)
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    top = header("planted", "p", artifact_location=None, tags={})
    entries = [{"artifact": path} for path in (str(secret), "../id_rsa", "link", str(tmp_path), ".")]
    entries += [{"image": str(tmp_path / "mine.png"), "key": "k", "step": 0}]
    write_lines(pending / "1.jsonl", [top, *entries, ended("FINISHED")])
    write_lines(pending / "2.jsonl", [top | {"experiment": "../../../away", "key": "2"}, measured({"a": 1.0})])
    write_pending("sqlite:///there", outputs)
    (run,) = runs(flaky, "planted")
    assert run.info.status == "FINISHED"
    assert not flaky.list_artifacts(run.info.run_id)
    assert caplog.text.count("is no file in") == 6
    assert not (tmp_path / "away").exists()
    assert not (tmp_path.parent / "away").exists()


def test_a_pending_job_finds_its_files_where_outputs_was_moved_to(flaky, tmp_path):
    first, second = tmp_path / "A", tmp_path / "B"
    flaky.down = True
    record_job("sqlite:///there", first, **job(first))
    flaky.down = False
    recorders._failed.clear()
    first.rename(second)
    write_pending("sqlite:///there", second)
    (run,) = runs(flaky, "prepare")
    assert (second / "mlruns" / "prepare" / run.info.run_id / "artifacts" / "meta.json").exists()
    assert not first.exists()
