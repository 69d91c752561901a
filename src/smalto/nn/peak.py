"""What a device can do at best: the denominator of model FLOPs utilization."""

import time

import torch

from smalto.errors import InputError

NAMED_TFLOPS = {
    "v100": 125.0,
    "t4": 65.0,
    "a10": 125.0,
    "a100": 312.0,
    "l40s": 362.0,
    "rtx4090": 165.2,
    "h100": 989.4,
    "h200": 989.4,
    "b200": 2250.0,
}
"""Dense half-precision peaks of one device by its data sheet, TFLOP/s."""


def measured_tflops(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.5) -> float:
    """Best square matrix product seen in about so many seconds, TFLOP/s, with the threads of this process."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)  # ones: the run's random numbers are not touched
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def measured_bandwidth(device: torch.device, *, seconds: float = 0.5) -> float:
    """Best copy of 256 MB seen in about so many seconds, GB/s read and written."""
    a = torch.ones(2**26, device=device)
    b = torch.empty_like(a)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        b.copy_(a)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * a.nbytes / best / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tflops(wanted: float | str | None, device: torch.device, dtype: torch.dtype) -> float:
    """A number as it is, the peak of a named device, or, for None, what is measured now.

    Raises:
        ValueError: a name that is not in ``NAMED_TFLOPS``, or a number that is not positive.
    """
    if wanted is None:
        return measured_tflops(device, dtype)
    if isinstance(wanted, str):
        if wanted not in NAMED_TFLOPS:
            raise InputError(
                f"peak_tflops is {wanted!r}, known devices are {', '.join(NAMED_TFLOPS)}; or give a number (TFLOP/s of "
                "one device), or null to measure"
            )
        return NAMED_TFLOPS[wanted]
    if wanted <= 0:
        raise InputError(f"peak_tflops is {wanted}, must be positive (TFLOP/s of one device), or null to measure")
    return float(wanted)
