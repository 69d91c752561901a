"""MLflow stores for tests: a fresh database in a folder, and clients that fail when they are told to."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from smalto.analysis.store import prepare_database


@cache
def _template() -> Path:
    """One empty database, which takes seconds to make."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    prepare_database(folder / "mlflow.db")
    return folder / "mlflow.db"


def database(outputs: Path) -> str:
    """The address of a new, empty database in ``outputs``."""
    outputs.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(), outputs / "mlflow.db")
    return f"sqlite:///{outputs}/mlflow.db"


class Flaky:
    """A client whose calls fail while ``down``, or once after they had their effect if ``lose`` is their name."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.down = False
        self.lose = ""
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if self.down:
                raise MlflowException("the store is down", TEMPORARILY_UNAVAILABLE)
            result = getattr(self._client, name)(*args, **kwargs)
            if name == self.lose:
                self.lose = ""
                raise MlflowException("the answer was lost", TEMPORARILY_UNAVAILABLE)
            return result

        return call
