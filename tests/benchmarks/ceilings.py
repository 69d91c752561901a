"""What this machine can do at best, with the threads of this process: the denominators of every other figure."""

import time

import torch

from benchmarks.rows import Row, unmeasured
from smalto.nn.hardware import has_fast_bf16
from smalto.nn.peak import measured_tflops

READ_BYTES = 400 * 10**6
"""Beyond every cache; as much as the float32 weights that a decode step of B streams."""


def ceiling_rows(*, seconds: float = 2.0) -> list[Row]:
    """Best matrix product in float32 and bfloat16, best sum over memory, each in about so many seconds."""
    rows = [_product("fp32", torch.float32, seconds)]
    bf16 = "matrix product, bf16, best"
    rows.append(_product("bf16", torch.bfloat16, seconds) if has_fast_bf16("cpu") else unmeasured(bf16))
    return [*rows, Row("memory read, best", read_gigabytes(seconds=seconds), None, None, "GB/s")]


def _product(name: str, dtype: torch.dtype, seconds: float) -> Row:
    gigaflops = 1e3 * measured_tflops(torch.device("cpu"), dtype, seconds=seconds)
    return Row(f"matrix product, {name}, best", gigaflops, None, None, "GFLOP/s")


def read_gigabytes(*, seconds: float) -> float:
    """Fastest sum of float32 over ``READ_BYTES``, GB/s of wall time."""
    values = torch.ones(READ_BYTES // 4)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return READ_BYTES / best / 1e9
