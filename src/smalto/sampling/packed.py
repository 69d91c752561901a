"""Weights laid out once for decoding, behind one call: ``packed_linear(weight, ...)(x)`` is ``F.linear(x, weight)``.

A decode step multiplies a few rows with every weight of the model, so its time is that of reading the weights. The
layouts here read them once and, in half precision, half as many bytes. The operators are torch's own but private;
where one is missing the plain ``F.linear`` does the same.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.hardware import bf16_units

log = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]

DTYPES = ("auto", "fp32", "bf16", "fp16", "int8")
BYTES_PER_WEIGHT = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_FP16_MAX = 65504.0
_INT8_COLUMNS = 32
"""The int8 kernels read past the end of rows that are no multiple of their vectors, 8 to 32 entries."""


def check_dtype(name: str) -> None:
    """Raise ValueError for an unknown name of a dtype."""
    if name not in DTYPES:
        raise InputError(f"engine.dtype is {name!r}, choose one of {', '.join(DTYPES)}")


def resolve_dtype(name: str, device: torch.device, *, packed: bool = True) -> str:
    """What ``auto`` means on ``device``, logged once per process; other names are checked and come back.

    ``bf16`` where the processor multiplies bfloat16 in hardware (:func:`smalto.nn.hardware.bf16_units`), on a CPU with
    oneDNN's kernel; else ``fp16`` weights under float32 activations on CPUs that have the kernels (11 bits of mantissa,
    bfloat16 has 8); else ``fp32``. A bf16 row may round otherwise among other rows: whoever needs each image to be the
    same bit for bit whatever it is drawn with asks for ``fp16`` or ``fp32`` by name.
    ``int8`` weights are never chosen by themselves: they change results visibly, and pay for one or two images only.
    Without ``packed`` weights there is no fp16.

    Raises:
        ValueError: an unknown name, or ``fp16`` where there is no kernel for it.
    """
    check_dtype(name)
    if name == "fp16" and not (device.type == "cpu" and _has_fp16()):
        raise InputError(
            "engine.dtype is 'fp16', which needs the FBGEMM kernels of an x86 CPU; "
            f"on {device} choose auto, fp32, bf16 or int8"
        )
    if name != "auto":
        return name
    dtype, reason = _fastest(device, packed=packed)
    _say_once(f"engine.dtype=auto is {dtype} on {device.type}: {reason}")
    return dtype


def _fastest(device: torch.device, *, packed: bool) -> tuple[str, str]:
    """A dtype, and why."""
    units, on_cpu = bf16_units(device), device.type == "cpu"
    if units is not None and (not on_cpu or _has_onednn("bf16")):
        return "bf16", f"bfloat16 in hardware ({units})"
    lacking = "no bfloat16 in hardware" if units is None else f"{units}, but no oneDNN kernel for it"
    if on_cpu and packed and _has_fp16():
        return "fp16", f"{lacking}; float16 weights"
    return "fp32", lacking


@cache
def _say_once(message: str) -> None:
    log.info(message)


def packed_linear(weight: Tensor, *, dtype: str, rows: int | None) -> Linear:
    """Multiplication with ``weight`` (out, in), float32 or bfloat16 rows (..., in) to (..., out).

    Args:
        weight: any float dtype; copied.
        dtype: ``fp32``, ``bf16``, ``fp16`` or ``int8``, see :func:`resolve_dtype`. bf16 takes and gives bfloat16,
            int8 gives what it takes, the others take and give float32.
        rows: number of rows the layout is chosen for; any other number works too. None: no layout but torch's own,
            for compilers, which cannot look into others.
    """
    weight = weight.detach().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    on_cpu = weight.device.type == "cpu"
    if dtype == "int8":
        return _Int8Linear(weight, fused=rows is not None and on_cpu and _has_int8())
    if dtype == "fp16":
        return _Fp16Linear(weight)
    if rows is not None and on_cpu and _has_onednn(dtype):
        return _OneDNNLinear(weight, rows)
    return _PlainLinear(weight)


def constant(x: Tensor) -> nn.Parameter:
    """``x`` as what a compiler knows to stay where it is: a CUDA graph copies any other input in every replay."""
    return nn.Parameter(x, requires_grad=False)


class _PlainLinear:
    def __init__(self, weight: Tensor) -> None:
        self.weight = constant(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class _OneDNNLinear:
    """oneDNN's blocked layout. In float32 a row's result is the same bit for bit whatever rows it comes with.

    For that the layout is never the one for a single row, whose kernels add in another order, and a single row is
    doubled where it would still be added in another order. One row in its own layout would be sooner, by a tenth with
    AVX-512 and a fifth with AVX2: the price of one float32 image that is drawn alone and without guidance.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self.uniform = weight.dtype == torch.float32
        rows = max(rows, 2) if self.uniform else rows
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
        self.multiply = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        if self.uniform and x.numel() == x.shape[-1] and _single_rows_differ():
            return self._multiply(torch.cat([x, x]))[:1]
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, None, "none", [], "")


class _Fp16Linear:
    """FBGEMM: float16 weights widened in registers, float32 activations and sums."""

    def __init__(self, weight: Tensor) -> None:
        if weight.numel() and float(weight.abs().max()) > _FP16_MAX:
            raise InputError(
                f"a weight of {float(weight.abs().max()):.3g} does not fit in fp16 (at most {_FP16_MAX:g}); "
                "use engine.dtype=fp32"
            )
        self.packed: Any = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), None)
        self.multiply = torch.ops.quantized.linear_dynamic_fp16.default

    def __call__(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.packed)


class _Int8Linear:
    """Integers of 8 bits with one scale per output, bfloat16 activations, float32 sums; rows come out alike.

    Rounding is to the nearest, ties to even; the largest weight of an output is 127 steps.
    """

    def __init__(self, weight: Tensor, *, fused: bool) -> None:
        scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        quantized = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        self.more = -weight.shape[1] % _INT8_COLUMNS if fused else 0
        self.weight = constant(F.pad(quantized, (0, self.more)).contiguous())
        self.scale = constant(scale.to(torch.bfloat16))
        self.fused = fused

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.to(torch.bfloat16)
        if not self.fused:  # a compiler widens the weights as they are read
            return (F.linear(rows, self.weight.to(rows.dtype)) * self.scale).to(x.dtype)
        rows = F.pad(rows.flatten(0, -2), (0, self.more))
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        return out.view(*x.shape[:-1], -1).to(x.dtype)


def uniform_rows(rows: int, dtype: str) -> int:
    """The number of rows to compute so that each comes out the same bit for bit whatever rows it comes with.

    FBGEMM's kernels for one and two rows add in another order than its others; a few more rows keep those away.
    """
    return _uniform_fp16_rows(rows) if dtype == "fp16" else rows


@cache
def _uniform_fp16_rows(rows: int) -> int:
    """The next number of rows at which FBGEMM rounds as it does for a multiple of 12 rows; found by trying."""
    generator = torch.Generator().manual_seed(0)
    packed: Any = torch.ops.quantized.linear_prepack_fp16(torch.randn(16, 512, generator=generator), None)
    x = torch.randn(1, 512, generator=generator).expand(12, -1).contiguous()
    expected = torch.ops.quantized.linear_dynamic_fp16(x, packed)[:1]
    for count in range(rows, rows + 12):
        x = x[:1].expand(count, -1).contiguous()
        if bool((torch.ops.quantized.linear_dynamic_fp16(x, packed) == expected).all()):
            return count
    return rows


@cache
def _single_rows_differ() -> bool:
    """Whether oneDNN adds the products of a single row in another order; found by trying (AVX-512: beyond 1024)."""
    generator = torch.Generator().manual_seed(0)
    linear = _OneDNNLinear(torch.randn(64, 4096, generator=generator), 2)
    x = torch.randn(1, 4096, generator=generator)
    return not torch.equal(linear._multiply(x), linear._multiply(x.expand(2, -1).contiguous())[:1])


@cache
def _has_onednn(dtype: str) -> bool:
    try:
        if dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        name = torch.bfloat16 if dtype == "bf16" else torch.float32
        _OneDNNLinear(torch.zeros(16, 16, dtype=name), 1)(torch.zeros(1, 16, dtype=name))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


@cache
def _has_fp16() -> bool:
    try:
        packed = torch.ops.quantized.linear_prepack_fp16(torch.zeros(16, 16), None)
        torch.ops.quantized.linear_dynamic_fp16(torch.zeros(1, 16), packed)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


@cache
def _has_int8() -> bool:
    try:
        weight, scale = torch.zeros(16, _INT8_COLUMNS, dtype=torch.int8), torch.ones(16, dtype=torch.bfloat16)
        torch._weight_int8pack_mm(torch.zeros(1, _INT8_COLUMNS, dtype=torch.bfloat16), weight, scale)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True
