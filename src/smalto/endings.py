"""How a command ends that does not end well: what it says, its exit code, and where its traceback goes.

Light on purpose: it is in place before anything heavy is imported.
"""

import errno
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from smalto.errors import REASONS, UserError, printable
from smalto.signals import Terminated

REFUSED, BUG, INTERRUPTED, PIPE_CLOSED, TERMINATED = 1, 70, 130, 141, 143
"""Exit codes: what the user or the machine can change; EX_SOFTWARE of sysexits.h; those of shells for signals."""
FULL = "HYDRA_FULL_ERROR"
"""Environment variable: 1 shows every traceback on the screen."""
_TEXTS = {
    r"can't allocate memory|not enough memory|[Cc]annot allocate memory|bad_alloc|failed to map segment": (
        "not enough memory (see ulimit -v, and what else runs here)"
    ),
    r"CUDA out of memory": "not enough memory on the GPU",
    r"can't start new thread|blas_thread_init": "this user may start no more threads (ulimit -u, ulimit -v)",
    r"Too many open files": REASONS[errno.EMFILE],
    r"No space left on device": REASONS[errno.ENOSPC],
    r"out of shared memory|shm_open": "not enough shared memory for workers (/dev/shm; num_workers=0 needs none)",
    r"DataLoader worker .*(exited unexpectedly|killed by signal)": "a worker that loads data was killed (memory?)",
    r"urlopen error|HTTP Error \d": "the network, or the server asked, does not give it",
}
"""What libraries say, in errors of no class of their own, when the machine gives no more."""
_CALL = re.compile(r"Error in (?:call to target|creating partial\()\s*'?([\w.]+)")


@dataclass(frozen=True)
class Ending:
    """What to tell.

    Attributes:
        message: in a few words.
        code: exit code.
    """

    message: str
    code: int = REFUSED

    @property
    def is_bug(self) -> bool:
        """Whether it is smalto's fault, so that the traceback is needed."""
        return self.code == BUG


def ending(error: BaseException) -> Ending:
    """How to tell of an error: whether the user or the machine can change it, or whether it is a bug."""
    interrupt = next((each for each in _chain(error, context=True) if isinstance(each, KeyboardInterrupt)), None)
    if interrupt is not None:
        code = TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
        return Ending("interrupted; the same command continues where it was", code)
    for each in _chain(error):
        text = _told(each)
        if text is not None:
            return Ending(text)
    wrapped = type(error).__name__ == "InstantiationException" and error.__cause__ is not None
    return Ending(one_line(error.__cause__ if wrapped and error.__cause__ else error), BUG)


def one_line(error: BaseException) -> str:
    """The first line of an error that says something, with its type."""
    text = first_line(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(message: str) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in message.splitlines() if line.strip()), "")


@contextmanager
def told(verb: str) -> Iterator[None]:
    """Around a command: an error ends it in one message with the exit code that fits."""
    try:
        yield
    except SystemExit:
        _stdout_is_closed()  # else Python's own end would say so
        raise
    except BaseException as error:
        sys.exit(report(verb, error))


def report(verb: str, error: BaseException) -> int:
    """Say what went wrong, keep the traceback of a bug; returns the exit code."""
    if isinstance(error, BrokenPipeError) and _stdout_is_closed():
        return PIPE_CLOSED
    end = ending(error)
    trace = "".join(traceback.format_exception(error))
    message = printable(end.message)
    if end.is_bug:
        where = _keep(verb, trace)
        if where is None and FULL not in os.environ:
            sys.stderr.write(trace)
        message += f"\nThis is a bug of smalto. Traceback: {where or 'above'}"
    if FULL in os.environ:
        sys.stderr.write(trace)
    sys.stderr.write(f"\nsmalto {verb}: {message}\n")
    return end.code


def _chain(error: BaseException, *, context: bool = False) -> Iterator[BaseException]:
    """An error and what it was raised from; with ``context`` also what it was raised after."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or (each.__context__ if context else None)


def _told(error: BaseException) -> str | None:
    """The message of an error that is no bug; None if it may be one."""
    text = str(error)
    if isinstance(error, UserError):
        if "\nOriginal Traceback" in text:  # raised in a process that loads data, told again by torch
            text = text.rpartition(f"{type(error).__name__}: ")[2].strip()
        return text or type(error).__name__
    if isinstance(error, OSError) and error.errno in REASONS:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([REASONS[error.errno], *names[:1]])
    if isinstance(error, (MemoryError, RuntimeError, ImportError, OSError)):
        reason = next((reason for pattern, reason in _TEXTS.items() if re.search(pattern, text)), None)
        if isinstance(error, MemoryError) or reason is not None:
            return f"{reason or 'not enough memory'} ({one_line(error)})"
    return _told_by_libraries(error)


def _told_by_libraries(error: BaseException) -> str | None:
    """The same for what Hydra, OmegaConf and Lightning say of settings; none of them is imported for it."""
    kinds = {kind.__name__: kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if kinds.get("MisconfigurationException") in ("lightning", "lightning_fabric"):
        return " ".join(str(error).split())
    if kinds.get("InstantiationException") == "hydra":
        return _told_by_constructor(error)
    if kinds.get("HydraException") == "hydra":
        options = getattr(error, "options", None)
        if options:  # a choice of a group that there is not
            file = getattr(error, "missing_cfg_file", None)
            return f"there is no {file}; choose one of {', '.join(each for each in options if each[0] != '_')}"
        cause = error.__cause__
        if str(error).startswith("LexerNoViableAltException: "):
            given = str(error).splitlines()[0].partition(": ")[2]
            return f"{given} cannot be read; letters like these belong into quotes: 'key=\"value\"'"
        unknown = re.match(r"Could not override '([^']+)'", str(error))
        if unknown and "not in struct" in str(cause):
            hidden = f"; if the default does not show it: +{unknown[1]}=VALUE" if "." in unknown[1] else ""
            return f"there is no option {unknown[1]}; --cfg job shows all there are{hidden}"
        inner = "OmegaConfBaseException" in {kind.__name__ for kind in type(cause).__mro__}
        return _joined(str(error), str(cause) if inner else "")
    if kinds.get("MissingMandatoryValue") == "omegaconf":
        key = getattr(error, "full_key", None) or "an option"
        return f"{key} is needed: {key}=VALUE"
    if kinds.get("OmegaConfBaseException") == "omegaconf":
        # Those two are what config.no_such_key raises in our own code.
        return None if kinds.keys() & {"ConfigAttributeError", "ConfigKeyError"} else _joined(str(error))
    # A setting that Hydra's own code stumbles over.
    return _joined(str(error)) if isinstance(error, ValueError) and _raised_in(error) == "hydra" else None


def _raised_in(error: BaseException) -> str:
    """The package whose code raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0]


def _told_by_constructor(error: BaseException) -> str | None:
    """What was wrong in the settings of an object; None if it is the code of the object that is wrong."""
    cause = error.__cause__
    if cause is None:
        return _joined(str(error))
    if _told(cause) is not None:
        return None  # it says it better
    where = next((line for line in str(error).splitlines() if line.startswith("full_key: ")), "")
    where = f" ({where.removeprefix('full_key: ')})" if where else ""
    target = _CALL.match(str(error))
    if target is None:
        return f"{str(error).splitlines()[0].partition(', set env var')[0]}{where}: {one_line(cause)}"
    frames = cause.__traceback__
    called = frames is not None and frames.tb_next is not None  # else its arguments did not fit
    foreign = not target[1].startswith("smalto.") and isinstance(cause, (ValueError, TypeError))
    return None if called and not foreign else f"{target[1]}{where}: {' '.join(str(cause).split())}"


def _joined(*texts: str) -> str:
    """Lines of text as one, without what helps nobody."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    silent = ("object_type=", "reference_type=", "See https://", "Config search path", "provider=")
    return "; ".join(
        line.removeprefix("full_key: ").rstrip(".") for line in lines if line and not line.startswith(silent)
    )


def _keep(verb: str, trace: str) -> Path | None:
    """Append a traceback to the log of the run, else to a file of its own in the outputs; None if neither can be."""
    handlers = [each for each in logging.getLogger().handlers if isinstance(each, logging.FileHandler)]
    open_logs = [path for path in (Path(each.baseFilename) for each in handlers) if path.is_file()]
    now = datetime.now()
    outputs = Path(os.path.expanduser(os.environ.get("SMALTO_OUTPUTS", "outputs"))).absolute()
    stamp = os.environ.get("SMALTO_LAUNCHED_AT", f"{now:%Y-%m-%d_%H-%M-%S}")
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
    for path in (*open_logs, outputs / "logs" / f"{verb}-{stamp}.log"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{now:%Y-%m-%d %H:%M:%S}, rank {rank}, {' '.join(sys.argv)}\n{trace}")
        except OSError:
            continue
        return path
    return None


def _stdout_is_closed() -> bool:
    """Whether nobody reads what is printed any more; then it goes nowhere from here on."""
    try:
        pipe = select.poll()
        pipe.register(sys.stdout.fileno(), select.POLLOUT)
        closed = any(event & select.POLLERR for _, event in pipe.poll(0))
        if closed:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file behind it
        return False
    return closed
