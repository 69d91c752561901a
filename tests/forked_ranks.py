"""Several ranks with gloo, forked from the test: nothing is imported again, so two take a fraction of a second."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_ranks(function: Callable[[int], Any], world_size: int) -> list[Any]:
    """``function(rank)`` in each rank at the same time; their results, the text of an exception where one failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    jobs = [context.Process(target=_run, args=(function, r, world_size, port, queue)) for r in range(world_size)]
    for job in jobs:
        job.start()
    try:
        results = dict(queue.get(timeout=120) for _ in jobs)
        for job in jobs:
            job.join(30)
    finally:
        for job in jobs:
            job.kill()
    return [results[rank] for rank in range(world_size)]


def _run(function: Callable[[int], Any], rank: int, world_size: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)  # as in DataLoader's workers: OpenMP's threads do not survive a fork
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        queue.put((rank, function(rank)))
    except BaseException:
        queue.put((rank, traceback.format_exc()))
