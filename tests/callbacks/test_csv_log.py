"""One file, one row for every step, whatever happened to the process that wrote it."""

import csv

import pytest

from smalto.callbacks.csv_log import CSVLog
from smalto.errors import StorageError


def rows(folder) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def log(folder, *values: tuple[int, dict[str, float]]) -> None:
    logger = CSVLog(folder=folder)
    for step, metrics in values:
        logger.log_metrics(metrics, step=step)
        logger.save()


def test_new_columns_keep_what_was_written(tmp_path):
    log(tmp_path / "logs", (0, {"a": 1 / 3}), (1, {"a": 2.0, "b": 3.0}), (2, {"b": 4.0}))
    assert rows(tmp_path / "logs") == [
        {"step": "0", "a": repr(1 / 3)},
        {"step": "1", "a": "2.0", "b": "3.0"},
        {"step": "2", "b": "4.0"},
    ]


def test_what_was_logged_before_an_interruption_is_not_logged_again(tmp_path):
    log(tmp_path, (0, {"a": 1.0, "epoch": 0.0}), (1, {"a": 2.0, "epoch": 0.0}))
    log(tmp_path, (1, {"a": 2.0, "epoch": 0.0}), (1, {"val": 5.0, "epoch": 0.0}), (2, {"a": 3.0, "epoch": 0.0}))
    assert [(row["step"], row.get("a"), row.get("val")) for row in rows(tmp_path)] == [
        ("0", "1.0", None),
        ("1", "2.0", None),
        ("1", None, "5.0"),
        ("2", "3.0", None),
    ]
    assert all("epoch" in row for row in rows(tmp_path))


def test_a_row_that_was_cut_short_is_written_again(tmp_path):
    log(tmp_path, (0, {"a": 0.123456}), (1, {"a": 0.234567}))
    file = tmp_path / "metrics.csv"
    file.write_bytes(file.read_bytes()[:-6])
    log(tmp_path, (1, {"a": 0.234567}), (2, {"a": 0.5}))
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [("0", "0.123456"), ("1", "0.234567"), ("2", "0.5")]


@pytest.mark.parametrize("left", [b"", b"a,st", b"a,step\n", b"a,step\n0.5", b"\xff\x00\n"])
def test_whatever_a_kill_leaves_of_the_file_it_goes_on(tmp_path, left):
    (tmp_path / "metrics.csv").write_bytes(left)
    log(tmp_path, (0, {"a": 0.25}), (1, {"a": 0.5, "b": 1.0}))
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [("0", "0.25"), ("1", "0.5")]


def test_a_folder_that_is_gone_is_one_message_and_tidying_up_adds_none(tmp_path):
    logger = CSVLog(folder=tmp_path / "logs")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.save()
    (tmp_path / "logs/metrics.csv").unlink()
    (tmp_path / "logs").rmdir()
    logger.log_metrics({"a": 1.0}, step=1)
    with pytest.raises(StorageError, match=r"logs/metrics.csv: No such file.*was the run folder removed"):
        logger.save()
    logger.finalize("failed")
