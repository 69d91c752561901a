"""Map over worker processes in order, with few items in flight, and without leaving processes behind."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import TypeVar

from smalto.errors import UserError

In = TypeVar("In")
Out = TypeVar("Out")


def available_cpus() -> int:
    """Processors this process may use; in a container or under taskset fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def ordered_map(function: Callable[[In], Out], items: Iterable[In], *, workers: int) -> Generator[Out, None, None]:
    """``map(function, items)`` on ``workers`` processes; 0 works in this one. Order is kept.

    Items are drawn only a little ahead of the results, so a huge iterable is fine. ``function`` and items are
    pickled; processes are spawned, so that threads and locks of the parent do not come along.

    Raises:
        UserError: a worker was killed from outside.
    """
    if workers == 0:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)
    waiting: deque[Future[Out]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise UserError("a worker process was killed, perhaps out of memory; try fewer workers=") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _follow_parent() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is killed (the pool alone would wait for ever)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(process: BaseProcess) -> None:
    process.join()
    os._exit(1)
