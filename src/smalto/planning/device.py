"""Devices one can rent, by their data sheets, and the one at hand, by measurement."""

import os
from dataclasses import dataclass

import torch

from smalto.errors import InputError
from smalto.nn.hardware import has_fast_bf16
from smalto.nn.peak import measured_bandwidth, measured_tflops

GIB = 2**30

HALF = ("bf16-mixed", "bf16-true", "16-mixed", "16-true")
"""Precisions of Lightning in which matrix products are half precision."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What decides whether a training fits a device, and how long it takes there.

    Args:
        name: for the report.
        memory_gib: what torch reports as its total capacity, GiB (2^30 bytes); less than on the box.
        fp32_tflops: dense peak in float32, TFLOP/s; TF32 is not used by ``precision=32-true``.
        half_tflops: dense peak in float16, and in bfloat16 if it has that.
        bf16: whether it has units for bfloat16.
        bandwidth_gb_s: of its memory, GB/s.
        kind: ``cuda`` or ``cpu``: what a training step keeps differs.
        link_gb_s: to other devices of the node, one way, GB/s; None: not known.
    """

    name: str
    memory_gib: float
    fp32_tflops: float
    half_tflops: float
    bf16: bool
    bandwidth_gb_s: float
    kind: str = "cuda"
    link_gb_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_gib", "fp32_tflops", "half_tflops", "bandwidth_gb_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"devices.{self.name}.{name} is {getattr(self, name)}, must be positive")
        if self.link_gb_s is not None and not self.link_gb_s > 0:
            raise InputError(f"devices.{self.name}.link_gb_s is {self.link_gb_s}, must be positive, or null: not known")

    def peak_flops(self, precision: str) -> float:
        """FLOP/s at best in a ``trainer.precision``.

        Raises:
            ValueError: a bfloat16 precision on a GPU without.
        """
        if precision.startswith("bf16") and not self.bf16 and self.kind != "cpu":  # emulated there, and measured so
            raise InputError(
                f"trainer.precision is {precision}, {self.name} has no units for bfloat16; set "
                "trainer.precision=16-mixed (generators), 32-true, or another device="
            )
        return 1e12 * (self.half_tflops if precision in HALF else self.fp32_tflops)


def measured_device(
    *,
    memory_gib: float | None = None,
    fp32_tflops: float | None = None,
    half_tflops: float | None = None,
    bandwidth_gb_s: float | None = None,
    link_gb_s: float | None = None,
) -> Device:
    """The first GPU of this machine, else its CPU with the threads torch uses; what is given is not measured.

    Links to other devices are not measured.
    """
    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        device, name = torch.device("cpu"), f"this machine, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name=name,
        memory_gib=memory_gib or memory / GIB,
        fp32_tflops=fp32_tflops or measured_tflops(device, torch.float32, seconds=0.3),
        half_tflops=half_tflops or measured_tflops(device, torch.bfloat16, seconds=0.3),
        bf16=has_fast_bf16(device),
        bandwidth_gb_s=bandwidth_gb_s or measured_bandwidth(device, seconds=0.3),
        kind=device.type,
        link_gb_s=link_gb_s,
    )
