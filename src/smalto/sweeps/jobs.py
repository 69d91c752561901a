"""One job of a sweep: a process of its own, with its log and its record.

A process each, whatever the launcher: nothing leaks from one job to the next, a job that is killed takes no other
along, several GPUs work as in a single run, and the GPUs of a job are fixed before anything looks for them.
"""

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from smalto.data.ranks import leads
from smalto.endings import ending, first_line
from smalto.files import write_bytes, write_json
from smalto.redact import redacted
from smalto.sweeps.devices import claimed, devices_wanted, visible_devices
from smalto.sweeps.names import STOP, WHOLE_CONFIG
from smalto.sweeps.process import how_it_ended, wait_for
from smalto.sweeps.table import ENDED

log = logging.getLogger(__name__)

RECORD, LOG = "job.json", "job.log"
"""Files in the folder of a job; ``job.yaml`` is its config."""
MAIN_METRICS = ("val/loss", "val/loss_bf16", "val/psnr")
"""What a table shows of a job: the first of these that it measured."""


def run_job(module: str, config: DictConfig, check: Callable[[DictConfig], None]) -> dict[str, Any]:
    """Run what Hydra is about to run, unless it is finished; returns its record, whatever happens to it.

    Args:
        module: whose ``run(config)`` it is. If it has ``finished(config)``, that tells what a job that ended before
            measured, from its resolved config; else the job runs again.
        config: of the job.
        check: puts the values of a config right, or says which are wrong; loads what the job builds.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    before = read_record(folder) or {}
    record: dict[str, Any] = {
        "job": hydra.job.num,
        "name": folder.name,
        "overrides": list(hydra.overrides.task),
        "status": "running",
        "log": str(folder / LOG),
    }
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        if (folder.parent / STOP).exists():
            return before
        metrics = None
        if before.get("status") in ENDED:
            finished = getattr(import_module(module), "finished", None)
            check(config)  # else left to the process of the job: this one loads nothing that it does not need
            plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            metrics = finished(plain) if finished is not None else None
        if metrics is not None:
            record |= {"status": "kept", "seconds": before.get("seconds"), **main_metric(metrics)}
            log.info("job %s is finished already", folder.name)
        else:
            echo = hydra.launcher._target_.endswith("BasicLauncher")
            share = hydra.launcher._target_.endswith(("JoblibLauncher", "LocalLauncher"))
            record = start(module, folder, plain, record, echo=echo, share=share)
    except Exception as error:
        end = ending(error)
        record |= {"status": "failed", "error": first_line(end.message)}
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)) if end.is_bug else f"{end.message}\n")
    if leads():
        write_record(folder, record)
    if record["status"] == "failed":
        log.error("job %s failed: %s\n  log: %s", folder.name, record["error"], record["log"])
    return record


def start(
    module: str, folder: Path, plain: dict[str, Any], record: dict[str, Any], *, echo: bool, share: bool
) -> dict[str, Any]:
    """Run a job in a process and wait for it; returns the record as it then is.

    Args:
        module: whose ``run(config)`` it is.
        folder: of the job, with its config.
        plain: its resolved config.
        record: so far.
        echo: show its messages here too.
        share: jobs run side by side on this machine, so each takes GPUs of its own.
    """
    visible = visible_devices() if share else []
    environment = dict(os.environ)
    stem = "job" if leads() else f"job.rank{os.environ['SLURM_PROCID']}"  # a scheduler may start several for one job
    log_file, config_file = folder / f"{stem}.log", folder / f"{stem}.yaml"
    write_bytes(config_file, OmegaConf.to_yaml(redacted(plain)).encode())
    if redacted(plain) != plain:
        environment[WHOLE_CONFIG] = json.dumps(plain)
    with claimed(devices_wanted(plain, len(visible)) if visible else 0, visible) as (devices, files):
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
            record = record | {"devices": devices}
        if leads():
            write_record(folder, record)
        log.info("job %s started; log: %s", folder.name, log_file)
        began = time.monotonic()
        command = [sys.executable, "-m", "smalto", "sweep_job", module, str(config_file)]
        try:
            code = wait_for(command, environment, log_file, files, echo=echo)
        finally:
            seconds = round(time.monotonic() - began, 1)
            if leads():
                record = (read_record(folder) or record) | {"seconds": seconds}
                write_record(folder, record)
    if not leads():
        return record
    if record["status"] == "running":  # it could not say what happened to it
        record |= {"status": "failed", "error": how_it_ended(code)}
    if record["status"] == "finished":
        log.info("job %s finished in %.0f s, %s %s", folder.name, seconds, record.get("metric"), record.get("value"))
    return record


def main_metric(result: Any) -> dict[str, Any]:
    """``metric`` and ``value`` of what a job returned, for the table; nothing if it measured nothing."""
    numbers = {k: v for k, v in result.items() if isinstance(v, float)} if isinstance(result, dict) else {}
    best = next((key for key in (*MAIN_METRICS, *numbers) if key in numbers), None)
    return {} if best is None else {"metric": best, "value": numbers[best]}


def read_record(folder: Path) -> dict[str, Any] | None:
    """What is known of the job in ``folder``; None if it never began."""
    file = folder / RECORD
    return json.loads(file.read_text()) if file.exists() else None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Keep what is known of a job."""
    write_json(folder / RECORD, redacted(record))
