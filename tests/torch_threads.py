"""Torch on another number of threads, for tests of what must not depend on it."""

from collections.abc import Iterator

import torch


def on_threads(count: int) -> Iterator[int]:
    """For fixtures: ``yield from on_threads(2)``."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)
