"""A sweep as its launching process sees it: what is planned, what came of it, how to go on."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from smalto.endings import report
from smalto.errors import InputError
from smalto.files import write_bytes, write_json
from smalto.redact import redacted, redacted_places
from smalto.signals import begin_work
from smalto.sweeps.jobs import read_record
from smalto.sweeps.names import LAUNCHER_PID, STOP, SWEPT, job_name
from smalto.sweeps.process import PATIENCE
from smalto.sweeps.table import ENDED, sweep_report

MEMORY = "sweep.json"
"""In the folder of a sweep: the command, for ``smalto resume``."""
SWEPT_MODULES = {f"smalto.{verb}" for verb in ("train", "prepare", "extract", "sample", "evaluate", "plan", "convert")}


@dataclass
class Sweep:
    """The running sweep of this process.

    Attributes:
        folder: of the sweep; one folder in it for each job.
        swept: keys that differ between jobs.
        planned: overrides of each job, by number; None if the sweeper decides as it goes.
        parent: the MLflow run over those of the jobs, if they are logged there.
    """

    folder: Path
    swept: list[str]
    planned: list[list[str]] | None
    parent: Any = None
    current: ClassVar["Sweep | None"] = None
    module: ClassVar[str] = ""  # of the command that runs

    def records(self) -> list[dict[str, Any]]:
        """What is known of each job, by number."""
        if self.planned is None:
            found = [read_record(file.parent) or {} for file in self.folder.glob("*/job.json")]
            return sorted(found, key=lambda record: record["job"])
        rows = []
        for number, overrides in enumerate(self.planned):
            name = job_name(overrides, self.swept)
            known = read_record(self.folder / name) or {"status": "not run", "name": name, "overrides": overrides}
            rows.append(known | {"job": number})
        return rows

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Answer Ctrl-C while others run the jobs: let them save first, as joblib kills what it has started."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stderr.write("\nstopping: running jobs save; once more to stop at once\n")
        (self.folder / STOP).touch()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(record["status"] == "running" for record in self.records()):
            time.sleep(0.5)
        raise KeyboardInterrupt

    def close(self, error: BaseException | None) -> int:
        """Print the table and end the parent run; returns the exit code.

        Args:
            error: what ended the sweep before its jobs did.
        """
        records = self.records()
        for record in records:
            if record["status"] == "running":  # its process had no time to say
                record["status"] = "interrupted"
        if all(record["status"] == "not run" for record in records):  # refused before the first job
            if self.parent is not None:
                self.parent.forget()
            return 1
        text = sweep_report(records, self.swept, self.folder)
        write_bytes(self.folder / "table.txt", text.encode())
        sys.stdout.write(f"\n{text}")
        whole = all(record["status"] in ENDED for record in records)
        interrupted = isinstance(error, KeyboardInterrupt)
        if self.parent is not None:
            statuses = [record["status"] for record in records]
            counts = {status: statuses.count(status) for status in set(statuses)}
            status = "KILLED" if interrupted else "FINISHED" if whole else "FAILED"
            self.parent.close(status, counts, text)
        return 130 if interrupted else 0 if whole and error is None else 1


class SweepStart(Callback):
    """What the launching process does before the first job; Hydra makes it in every run, sweep or not."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the plan, open the parent run."""
        begin_work()
        try:
            Sweep.current = begin(config)
        except Exception as error:  # Hydra would warn and go on
            sys.exit(report("sweep", error))


def begin(config: DictConfig) -> Sweep:
    """The sweep that ``config`` is about to run, with its folder, its command and its parent run noted."""
    folder = Path(config.hydra.sweep.dir).absolute()
    swept, planned = plan_of(config)
    os.environ[SWEPT] = json.dumps(swept)
    os.environ[LAUNCHER_PID] = str(os.getpid())
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("hydra.sweep.dir=")]
    told = {"module": Sweep.module, "arguments": redacted(arguments), "cwd": os.getcwd()}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MEMORY, told)
    (folder / STOP).unlink(missing_ok=True)
    sweep = Sweep(folder, swept, planned)
    if config.hydra.launcher._target_.endswith("JoblibLauncher"):
        signal.signal(signal.SIGINT, sweep.stop)
    if (config.get("logger") or {}).keys():
        # Seconds of import, only where they are wanted.
        from smalto.callbacks.mlflow_logger import mlflow_node
        from smalto.sweeps.parent import ParentRun

        node = mlflow_node(config)
        if node is not None:
            sweep.parent = ParentRun(node, folder, {"command": redacted(" ".join(sys.argv))})
    return sweep


def plan_of(config: DictConfig) -> tuple[list[str], list[list[str]] | None]:
    """Swept keys, and the overrides of each job as Hydra's own sweeper will number them (None with another one)."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    lines = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    swept = list(dict.fromkeys(each.get_key_element() for each in overrides if each.is_sweep_override()))
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return swept, None
    return swept, BasicSweeper.split_arguments(overrides, None)[0]


@contextmanager
def reported(module: str) -> Iterator[None]:
    """Around Hydra: if it ran a sweep, print what came of it and leave with the code for that.

    Args:
        module: of the command, whose ``main`` continues the sweep.
    """
    Sweep.module = module
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        if Sweep.current is None:
            raise
        error = raised
    sweep, Sweep.current = Sweep.current, None
    if sweep is not None:
        code = sweep.close(error)
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error
        if code:
            sys.exit(code)


def is_sweep(folder: Path) -> bool:
    """Whether a sweep began in ``folder``."""
    return (folder / MEMORY).exists()


def again(folder: Path) -> None:
    """Run the command of the sweep in ``folder`` again, there: what is finished is kept, the rest runs."""
    try:
        command = json.loads((folder / MEMORY).read_text())
        arguments, cwd, module = [*command["arguments"]], command["cwd"], command["module"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MEMORY} is damaged ({error}); give the sweep's command again with hydra.sweep.dir={folder}"
        ) from error
    if module not in SWEPT_MODULES:
        raise InputError(f"{folder / MEMORY} names {module!r}, which is no command of smalto that can be swept")
    if redacted_places(arguments):
        raise InputError(
            f"{folder / MEMORY} keeps no credentials ({' '.join(arguments)}): give the whole command again, "
            f"with hydra.sweep.dir={folder}"
        )
    place = str(folder.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    sys.argv[1:] = [*arguments, f"hydra.sweep.dir='{place}'"]
    os.chdir(cwd)
    import_module(module).main()
