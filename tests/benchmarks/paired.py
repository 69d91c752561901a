"""Interleaved timing: contestants take turns within a round, and figures are medians of ratios within rounds.

Neighbours on a machine and its clock change from second to second; a ratio of two times of the same seconds does not
see it. With one thread the clock is the processor time of this process, with more it is the wall.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch


def interleave(
    contestants: Mapping[str, Callable[[int], object]], *, rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of every contestant in every round; a contestant is called with the number of the round.

    With ``warm`` a first round is not counted; long calls do without.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for contestant in contestants.values() if warm else ():
        contestant(0)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds):
        for name, contestant in contestants.items():
            start = clock()
            contestant(i)
            seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], ours: str, *theirs: str) -> float:
    """Median over the rounds of our time by their better time of the same round."""
    best = min(theirs, key=lambda name: median(seconds[name]))
    return median(a / b for a, b in zip(seconds[ours], seconds[best], strict=True))
