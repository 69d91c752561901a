"""Which GPUs a job of a sweep gets when several run on one machine: its own, and only while it runs."""

import getpass
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from smalto.errors import InputError, StorageError
from smalto.files import FileLock

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
        raise InputError(
            f"a job wants {wanted} GPUs (trainer.devices), this machine shows {len(visible)}: {','.join(visible)}; "
            "set trainer.devices to what one job may have"
        )
    folder = Path(tempfile.gettempdir()) / f"smalto-gpus-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise StorageError(f"{folder} is a link, or somebody else's; remove it, or set TMPDIR to a folder of your own")
    waiting = False
    while True:
        with ExitStack() as stack:
            held: dict[str, FileLock] = {}
            for name in visible:
                if len(held) == wanted:
                    break
                # Kept: a job that inherited it holds it longer than we do.
                lock = FileLock(folder / name.replace("/", "_"), keep=True)
                if lock.try_acquire():
                    held[name] = stack.enter_context(lock)
            if len(held) == wanted:
                yield list(held), [lock.fileno() for lock in held.values()]
                return
        if not waiting:
            log.info("waiting for %d free GPU(s) of %s", wanted, ",".join(visible))
            waiting = True
        time.sleep(1 + os.getpid() % 7 / 10)  # jobs that want several must not take and release in step
