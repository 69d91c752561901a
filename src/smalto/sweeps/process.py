"""The process of a job: started apart from the terminal, waited for, shown, told to stop."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

from smalto.sweeps.names import STOP

PATIENCE = 60.0
"""Seconds that an interrupted job has to save."""


def wait_for(command: list[str], environment: dict[str, str], log_file: Path, files: list[int], *, echo: bool) -> int:
    """Run a command to its end, with what it says appended to ``log_file``; returns its exit code.

    The process writes the file itself: a pipe would break, and the job with it, if this process were killed.
    Ctrl-C, and the sweep's wish to stop, are passed on once and waited for: the job saves. It does not get the
    terminal's own, which would be a second one that means "at once".
    """
    with log_file.open("ab") as file:
        begin = file.tell()
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=files,
        )
    reader = Thread(target=follow, args=(log_file, begin, process), daemon=True)
    if echo:
        reader.start()
    told = False
    try:
        while True:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                if not told and (log_file.parent.parent / STOP).exists():
                    process.send_signal(signal.SIGINT)
                    told = True
    except KeyboardInterrupt:
        if not told:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(PATIENCE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
        raise
    finally:
        if echo:
            reader.join(timeout=5)


def follow(log_file: Path, begin: int, process: subprocess.Popen) -> None:
    """Show what is appended to a file after ``begin`` while a process runs."""
    with log_file.open("rb") as file:
        file.seek(begin)
        while True:
            over = process.returncode is not None  # asked before reading, so that nothing said last is missed
            sys.stderr.buffer.write(file.read())
            sys.stderr.flush()
            if over:
                return
            time.sleep(0.2)


def how_it_ended(code: int) -> str:
    """Words for the exit code of a process that left no message."""
    if code >= 0:
        return f"ended with exit code {code} and no message"
    name = signal.Signals(-code).name
    return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
