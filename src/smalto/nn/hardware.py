"""What a device multiplies in hardware: the one place that is asked."""

import platform

import torch


def has_fast_bf16(device: torch.device | str) -> bool:
    """Whether products in bfloat16 are faster than in float32 there, see :func:`bf16_units`."""
    return bf16_units(device) is not None


def bf16_units(device: torch.device | str) -> str | None:
    """Name of the units of ``device`` that multiply bfloat16; None: it has none, or nobody can say.

    CPUs without AVX-512 or AMX units emulate them: tens of times slower (measured on a Zen 3: 10 against 90 GFLOP/s).
    Older GPUs emulate them too. Of Apple's GPUs torch does not tell which have them.
    """
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None
        if torch.version.hip is not None:
            return "ROCm"
        major, minor = torch.cuda.get_device_capability(device)
        return f"CUDA {major}.{minor}" if major >= 8 else None
    if device.type != "cpu":
        return None
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "Arm's bf16" if _arm_bf16() else None
    # Asked by private names, which older versions of torch lack. AMX first: it is the faster one where both are.
    for name, unit in (("AMX", "amx_tile"), ("AVX512-BF16", "avx512_bf16")):
        if getattr(torch.cpu, f"_is_{unit}_supported", bool)():
            return name
    return None


def _arm_bf16() -> bool:
    """As oneDNN says, which on x86 says so of every processor with AVX-512, emulated or not."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return False
