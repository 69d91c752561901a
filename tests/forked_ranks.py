"""Several ranks with gloo, forked from the test: nothing is imported again, so two take a fraction of a second.

Backward passes fail in forks of a process that has started autograd's threads: compiling does, and tensors of other
devices do. Where that has happened the same is done once more in processes that begin anew.
"""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import torch

THREADS = "Unable to handle autograd's threading in combination with fork-based multiprocessing"


def run_ranks(function: Callable[[int], Any], world_size: int) -> list[Any]:
    """``function(rank)`` in each rank at the same time; their results, the text of an exception where one failed."""
    return _started(function, world_size, joined=True)


def apart(function: Callable[[], Any]) -> Any:
    """What ``function`` gives in a process of its own.

    For what leaves a process in which backward passes of later forks fail.

    Raises:
        AssertionError: it failed; with its traceback.
    """
    ((fine, result),) = _started(lambda _: (True, function()), 1, joined=False, failed=lambda text: (False, text))
    assert fine, result
    return result


def _started(
    function: Callable[[int], Any], world_size: int, *, joined: bool, failed: Callable[[str], Any] = str
) -> list[Any]:
    for kind in ("fork", "spawn"):
        work = function if kind == "fork" else _Pickled(cloudpickle.dumps(function))
        results = _in_processes(work, world_size, kind=kind, joined=joined)
        if kind == "spawn" or not any(not fine and THREADS in result for fine, result in results):
            break
    return [result if fine else failed(result) for fine, result in results]


class _Pickled:
    """A function that another interpreter can read, whatever it closes over."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def __call__(self, rank: int) -> Any:
        return cloudpickle.loads(self.content)(rank)


def _in_processes(
    function: Callable[[int], Any], world_size: int, *, kind: str, joined: bool
) -> list[tuple[bool, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context: Any = multiprocessing.get_context(kind)
    queue = context.Queue()
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if joined else {}
    jobs = [context.Process(target=_run, args=(function, rank, place, queue)) for rank in range(world_size)]
    for job in jobs:
        job.start()
    try:
        results = {rank: (fine, result) for rank, fine, result in (queue.get(timeout=120) for _ in jobs)}
        for job in jobs:
            job.join(30)
    finally:
        for job in jobs:
            job.kill()
    return [results[rank] for rank in range(world_size)]


def _run(function: Callable[[int], Any], rank: int, place: dict[str, str], queue: Any) -> None:
    torch.set_num_threads(1)  # as in DataLoader's workers: OpenMP's threads do not survive a fork
    os.environ |= place | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if place else {})
    try:
        queue.put((rank, True, function(rank)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
