"""A training killed at any event and started again is the same as one that was not: weights, rows, final metrics."""

import csv
import json
import multiprocessing
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from lightning.pytorch.trainer import call

from smalto import train
from smalto.callbacks.checkpoint import newest_checkpoint
from smalto.errors import PathInUse
from smalto.runtime import compose
from tiny_tasks import TINY_GPT

KILLED = 9
STEPS = 5
SETTINGS = [
    *TINY_GPT,
    "callbacks=_common",
    "~callbacks.throughput",  # its values are times
    "~callbacks.progress",
    "+trainer.enable_progress_bar=false",
    "logger=csv",
    "model.num_layers=1",
    "data.num_train=12",  # an epoch of three batches ends where the checkpoint is and the validation is due
    "data.num_val=8",
    f"trainer.max_steps={STEPS}",
    "trainer.val_check_interval=3",
    "trainer.log_every_n_steps=1",
    "trainer.accelerator=cpu",
    "callbacks.checkpoint.every_n_steps=3",
]


def in_a_process(job: Callable[[], object]) -> int:
    """The exit code of ``job`` in a process of its own, which can die without tidying up."""

    def work() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        job()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def training(folder: Path, *, dies: tuple[str, str, int] | None = None, events: Path = Path(os.devnull)) -> int:
    """Train, or go on; ``dies`` says when: before or after a hook, at which step. All hooks are noted in ``events``."""

    def job() -> None:
        hooks = call._call_callback_hooks

        def watched(trainer, hook, *args, **kwargs):
            with events.open("a") as file:
                file.write(json.dumps([hook, trainer.global_step]) + "\n")
            if dies == ("before", hook, trainer.global_step):
                os._exit(KILLED)
            result = hooks(trainer, hook, *args, **kwargs)
            if dies == ("after", hook, trainer.global_step):
                os._exit(KILLED)
            return result

        call._call_callback_hooks = watched
        train.run(compose("train", [*SETTINGS, f"run_dir={folder}"]))

    return in_a_process(job)


def rows(folder: Path) -> list[dict[str, str]]:
    """What was logged, cells that are empty left out."""
    with (folder / "logs/metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """Leaves of a checkpoint by their places, tensors as bytes."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree.numpy().tobytes()}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else None
    if pairs is None:
        return {prefix: tree}
    return {place: leaf for key, value in pairs for place, leaf in flat(value, f"{prefix}/{key}").items()}


def result(folder: Path) -> dict[str, object]:
    """Weights, averages, optimizer and schedule of the end, as bytes; every row; the final metrics."""
    checkpoint = torch.load(newest_checkpoint(folder / "checkpoints"), weights_only=True)
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch")
    return {
        "state": flat({key: checkpoint[key] for key in kept}),
        "rows": rows(folder),
        "metrics": json.loads((folder / "metrics.json").read_text()),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert training(folder) == 0
    return result(folder)


def test_an_unbroken_run_logs_every_step_and_validates_where_it_says_and_at_the_end(whole):
    assert [int(row["step"]) for row in whole["rows"] if "train/loss" in row] == list(range(STEPS))
    assert [int(row["step"]) for row in whole["rows"] if "val/loss" in row] == [2, STEPS - 1]
    last = [row for row in whole["rows"] if "val/loss" in row][-1]
    assert float(last["val/loss"]) == whole["metrics"]["val/loss"]


def check(folder: Path, whole: dict, dies: tuple[str, str, int]) -> None:
    assert training(folder, dies=dies) == KILLED
    assert training(folder) == 0
    found = result(folder)
    for part in whole:
        assert found[part] == whole[part], f"{part} differ after a kill {dies}"


@pytest.mark.parametrize(
    "dies",
    [
        ("after", "on_train_batch_end", 3),  # the checkpoint is written, the row is not
        ("before", "on_validation_end", 3),  # it counts, its validation does not
        ("before", "on_train_batch_start", 4),  # and that is done too
    ],
    ids=str,
)
def test_killed_once(tmp_path, whole, dies):
    check(tmp_path, whole, dies)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_at_every_event(tmp_path, whole):
    assert training(tmp_path / "watched", events=tmp_path / "events") == 0
    events = sorted({tuple(json.loads(line)) for line in (tmp_path / "events").read_text().splitlines()})
    assert len(events) > 50
    for number, (hook, step) in enumerate(events):
        for when in ("before", "after"):
            check(tmp_path / f"{number}{when}", whole, (when, hook, step))


def test_a_validation_that_was_finished_is_not_repeated(tmp_path, whole):
    for dies in (("after", "on_validation_end", 3), ("after", "on_validation_end", STEPS)):
        assert training(tmp_path, dies=dies, events=tmp_path / f"events{dies[2]}") == KILLED
    assert training(tmp_path, events=tmp_path / "events") == 0
    seen = [json.loads(line) for name in ("events5", "events") for line in (tmp_path / name).read_text().splitlines()]
    assert [step for hook, step in seen if hook == "on_validation_end"] == [STEPS]
    assert result(tmp_path) == whole


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, whole):
    for dies in (
        ("after", "on_train_batch_end", 2),
        ("before", "on_validation_end", 3),
        ("before", "on_validation_batch_end", 3),  # while it makes up for that validation
        ("after", "on_train_batch_end", STEPS),
        ("after", "on_validation_start", STEPS),
        ("before", "on_validation_end", STEPS),
        ("before", "on_fit_end", STEPS),
    ):
        assert training(tmp_path, dies=dies) == KILLED
    assert training(tmp_path) == 0
    assert result(tmp_path) == whole


def test_of_two_commands_at_once_one_trains_and_the_other_is_told(tmp_path, whole):
    ready = multiprocessing.get_context("fork").Barrier(2)

    def code() -> int:
        def job() -> None:
            config = compose("train", [*SETTINGS, f"run_dir={tmp_path}"])
            ready.wait()
            try:
                train.run(config)
            except PathInUse as error:
                os._exit(3 if "is in use by process" in str(error) else 4)

        return in_a_process(job)

    with ThreadPoolExecutor(2) as pool:
        codes = sorted(future.result() for future in [pool.submit(code) for _ in range(2)])
    assert codes == [0, 3]
    assert result(tmp_path) == whole


def numbers(database: Path) -> dict[str, list[tuple[str, int, float]]]:
    """What MLflow has, by run folder."""
    query = (
        "SELECT p.value, m.key, m.step, m.value FROM metrics m JOIN params p USING (run_uuid) WHERE p.key = 'run_dir'"
    )
    found: dict[str, list[tuple[str, int, float]]] = {}
    with closing(sqlite3.connect(database)) as connection:
        for run, *number in connection.execute(query):
            found.setdefault(Path(run).name, []).append(tuple(number))
    return {run: sorted(values) for run, values in found.items()}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow_has_every_number_once_whatever_was_killed(tmp_path, monkeypatch):
    import mlflow  # noqa: F401  # once, not in every process

    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    monkeypatch.setattr("test_killed_training.SETTINGS", [s for s in SETTINGS if s != "logger=csv"])
    assert training(tmp_path / "whole") == 0
    for dies in (
        ("before", "on_train_batch_start", 2),  # steps that were logged and not saved
        ("before", "on_validation_end", 3),
        ("after", "on_train_batch_end", STEPS),
        ("before", "on_fit_end", STEPS),
    ):
        assert training(tmp_path / "killed", dies=dies) == KILLED
    assert training(tmp_path / "killed") == 0
    found = numbers(database)
    assert found["killed"] == found["whole"]
    assert len(found["whole"]) == len({number[:2] for number in found["whole"]})
    assert {(name, step) for name, step, _ in found["whole"] if name == "train/loss"} == {
        ("train/loss", step) for step in range(STEPS)
    }
