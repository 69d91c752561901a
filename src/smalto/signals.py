"""What SIGINT and SIGTERM do before, while and after a command works. Light, as it comes before all imports."""

import os
import signal
from types import FrameType


class AtOnce:
    """What SIGINT and SIGTERM do while there is nothing to save: end the process, with a line or without.

    Python's KeyboardInterrupt could come out of the middle of any import, and libraries make other errors of it.
    """

    def __init__(self, line: str | None) -> None:
        self._line = line

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._line is not None and os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(2, f"\n{self._line}\n".encode(errors="backslashreplace"))
        os._exit(128 + number)

    def install(self) -> None:
        """From now on; what the one who started us ignores stays ignored."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)


class Terminated(KeyboardInterrupt):
    """SIGTERM, answered like Ctrl-C."""


def begin_work() -> None:
    """From here on there is something to save: signals raise KeyboardInterrupt, if they were ours."""
    if isinstance(signal.getsignal(signal.SIGINT), AtOnce):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if isinstance(signal.getsignal(signal.SIGTERM), AtOnce):
        # One of several may wait for the others inside a library, where no handler of Python's runs.
        several = any(name in os.environ for name in ("WORLD_SIZE", "SLURM_PROCID", "LOCAL_RANK"))
        signal.signal(signal.SIGTERM, signal.SIG_DFL if several else _terminated)
        os.register_at_fork(after_in_child=_forget)


def _terminated(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _forget() -> None:
    """A worker that was forked has nothing to save, and ends at once."""
    if signal.getsignal(signal.SIGTERM) is _terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
