"""Which GPUs a job of a sweep gets when several run on one machine: its own, and only while it runs."""

import fcntl
import getpass
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def visible_devices() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES spells them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if told is not None:
        return [name.strip() for name in told.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def devices_wanted(plain: dict[str, Any], visible: int) -> int:
    """GPUs that a job should be given: 0 if it runs on the CPU, or if its config names devices one by one.

    Args:
        plain: resolved config of the job.
        visible: number of GPUs there are.
    """
    trainer = plain.get("trainer")
    if trainer is None:
        return 1 if plain.get("device") in ("auto", "cuda") else 0
    devices = trainer["devices"]
    if trainer["accelerator"] not in ("auto", "gpu", "cuda") or isinstance(devices, list):
        return 0
    return visible if devices in ("auto", -1, "-1") else int(devices)


@contextmanager
def claimed(wanted: int, visible: list[str]) -> Iterator[tuple[list[str], list[int]]]:
    """Wait until ``wanted`` GPUs are free, then hold them.

    A GPU is held by a locked file in the machine's temporary folder, so sweeps that know nothing of each other do not
    meet on it, and the system frees it whenever its holder ends, however it ends.

    Yields:
        Their names, and the open files; a process that inherits those keeps the GPUs when this one dies.

    Raises:
        ValueError: more wanted than there are.
    """
    if wanted > len(visible):
        raise ValueError(
            f"a job wants {wanted} GPUs (trainer.devices), this machine shows {len(visible)}: {','.join(visible)}; "
            "set trainer.devices to what one job may have"
        )
    folder = Path(tempfile.gettempdir()) / f"smalto-gpus-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    waiting = False
    while True:
        with ExitStack() as stack:
            held: dict[str, TextIOWrapper] = {}
            for name in visible:
                if len(held) == wanted:
                    break
                file = stack.enter_context((folder / name.replace("/", "_")).open("w"))
                if locked(file):
                    held[name] = file
            if len(held) == wanted:
                yield list(held), [file.fileno() for file in held.values()]
                return
        if not waiting:
            log.info("waiting for %d free GPU(s) of %s", wanted, ",".join(visible))
            waiting = True
        time.sleep(1 + os.getpid() % 7 / 10)  # jobs that want several must not take and release in step


def locked(file: TextIOWrapper) -> bool:
    """Lock an open file for this process and its heirs, if no one else has it.

    A file system without locks answers as if all were free.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("%s cannot be locked (%s)", file.name, error.strerror)
    return True
