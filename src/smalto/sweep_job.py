"""``python -m smalto.sweep_job MODULE CONFIG``: the process of one job of a sweep, in the folder of its config."""

import json
import logging
import os
import signal
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from omegaconf import OmegaConf

from smalto.data.ranks import leads
from smalto.files import alone_in
from smalto.runtime import USER_ERRORS, cause, keep_freed_memory, setup_logging
from smalto.sweeps.jobs import main_metric, one_line, read_record, write_record
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
    code = 1
    try:
        whole = os.environ.get(WHOLE_CONFIG)
        config = OmegaConf.create(json.loads(whole)) if whole else OmegaConf.load(config_file)
        if first:
            with alone_in(folder, patience=PATIENCE):
                result = import_module(module).run(config)
        else:
            result = import_module(module).run(config)
        outcome, code = {"status": "finished", **main_metric(result)}, 0
    except KeyboardInterrupt:
        outcome, code = {"status": "interrupted"}, 130
    except USER_ERRORS as error:
        sys.stderr.write(f"\n{cause(error)}\n")
        outcome = {"status": "failed", "error": one_line(cause(error))}
    except Exception as error:
        traceback.print_exc()
        outcome = {"status": "failed", "error": one_line(error)}
    if first:
        write_record(folder, (read_record(folder) or {}) | outcome)
    return code


def main() -> None:
    """The process."""
    setup_logging()
    end_with_the_sweep()
    if not torch.cuda.is_available():
        keep_freed_memory()
    module, config_file = sys.argv[1:]
    sys.exit(run(module, Path(config_file)))


if __name__ == "__main__":
    main()
