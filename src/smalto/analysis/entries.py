"""Entries of a journal: what can be said of a run, as plain data, and how it is said to MLflow."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from PIL import Image

from smalto.data.pictures import read_picture_file
from smalto.data.transforms import decode_image
from smalto.redact import redacted

REFUSED = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
"""Answers that another try would not change."""
Entry = dict[str, Any]
"""One of ``metrics: [[key, value, timestamp, step], ...]``, ``params: {...}``, ``tags: {...}``, ``artifact: PATH``,
``image: PATH`` with ``key`` and ``step``, ``text`` with ``file``, ``status`` with ``time``."""


def texts(tags: dict[str, Any]) -> dict[str, str]:
    """Tags as every store takes them, text or not there (only SQLite forgives None); without credentials."""
    return {key: redacted(str(value)) for key, value in tags.items() if value is not None}


def parameters(values: dict[str, Any], longest: int) -> Entry:
    """Parameters as MLflow takes them: text of limited length, without credentials."""
    return {"params": {key: str(value)[:longest] for key, value in redacted(values).items()}}


def measured(values: dict[str, float], step: int = 0) -> Entry:
    """Metrics of now, under names that MLflow takes."""
    now = int(time.time() * 1000)
    return {
        "metrics": [[re.sub(r"[^a-zA-Z0-9_/. -]+", "", key), float(value), now, step] for key, value in values.items()]
    }


def ended(status: str) -> Entry:
    """The end of a run: FINISHED, FAILED or KILLED; RUNNING begins it again."""
    return {"status": status, "time": int(time.time() * 1000)}


def last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Up to which step a run has each of its numbers."""
    names = client.get_run(run_id).data.metrics
    return {name: max(point.step for point in client.get_metric_history(run_id, name)) for name in names}


def send(client: MlflowClient, run_id: str, entry: Entry, base: Path) -> None:
    """Write one entry to a run; files are looked for in ``base`` if they do not say where they are."""
    match entry:
        case {"metrics": rows}:
            if rows:
                client.log_batch(run_id, metrics=[Metric(*row) for row in rows])
        case {"params": values}:
            items = [Param(key, value) for key, value in values.items()]
            for start in range(0, len(items), 100):
                client.log_batch(run_id, params=items[start : start + 100])
        case {"tags": values}:
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in values.items()])
        case {"artifact": path}:
            client.log_artifact(run_id, str(base / path))
        case {"image": path, "key": key, "step": step}:
            client.log_image(run_id, _picture(path), key=key, step=step)
        case {"text": text, "file": file}:
            client.log_text(run_id, text, file)
        case {"status": "RUNNING"}:
            client.update_run(run_id, status="RUNNING")
        case {"status": status, "time": when}:
            client.set_terminated(run_id, status, end_time=when)


def _picture(path: str) -> Image.Image:
    try:
        return decode_image(read_picture_file(Path(path)))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no picture any more: {error}") from error


def pieces(entry: Entry) -> Iterator[Entry]:
    """An entry as several, to find the one that is refused."""
    ((name, content),) = entry.items() if len(entry) == 1 else [("", None)]
    if isinstance(content, list):
        yield from ({name: [row]} for row in content)
    elif isinstance(content, dict):
        yield from ({name: {key: value}} for key, value in content.items())
    else:
        yield entry


def is_refusal(error: Exception) -> bool:
    """Whether the store, or its client, would say the same another time."""
    if isinstance(error, MlflowException):
        return error.error_code in REFUSED
    return isinstance(error, (TypeError, ValueError, FileNotFoundError))
