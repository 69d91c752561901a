"""``python -m smalto sweep_job MODULE CONFIG``: the process of one job of a sweep, in the folder of its config."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from smalto.data.ranks import leads
from smalto.endings import INTERRUPTED, TERMINATED, ending, first_line
from smalto.files import alone_in
from smalto.runtime import check, keep_freed_memory, setup_logging
from smalto.signals import begin_work
from smalto.sweeps.jobs import main_metric, read_record, write_record
from smalto.sweeps.names import LAUNCHER_PID, WHOLE_CONFIG
from smalto.sweeps.process import PATIENCE

log = logging.getLogger(__name__)


def end_with_the_sweep() -> None:
    """Save and stop when the process that launched the sweep is gone, even by ``kill -9``.

    Jobs that a scheduler runs are its own: they go on without whoever queued them.
    """
    pid = os.environ.get(LAUNCHER_PID)
    if pid is None or os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        return

    def watch(pid: int) -> None:
        while is_alive(pid):
            time.sleep(1)
        log.warning("the sweep is gone: saving and stopping")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PATIENCE)
        os._exit(1)

    Thread(target=watch, args=(int(pid),), daemon=True).start()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs, and is more than an exit code that nobody fetched."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def run(module: str, config_file: Path) -> int:
    """Run the job and note how it went; returns the exit code."""
    first, folder = leads(), config_file.parent
    outcome: dict[str, Any]
    try:
        whole = os.environ.get(WHOLE_CONFIG)
        config = OmegaConf.create(json.loads(whole)) if whole else OmegaConf.load(config_file)
        assert isinstance(config, DictConfig)
        job = import_module(module)
        check(config, job.main.verb)
        with alone_in(folder, patience=PATIENCE) if first else nullcontext():
            result = job.run(config)
        outcome, code = {"status": "finished", **main_metric(result)}, 0
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        end = ending(error)
        code = end.code
        if end.is_bug:
            traceback.print_exc()  # into the log of the job
        else:
            sys.stderr.write(f"\n{end.message}\n")
        outcome = {"status": "failed", "error": first_line(end.message)}
        if code in (INTERRUPTED, TERMINATED):
            outcome = {"status": "interrupted"}
    if first:
        write_record(folder, (read_record(folder) or {}) | outcome)
    return code


def main() -> None:
    """The process."""
    begin_work()
    setup_logging()
    end_with_the_sweep()
    if not torch.cuda.is_available():
        keep_freed_memory()
    module, config_file = sys.argv[1:]
    sys.exit(run(module, Path(config_file)))
