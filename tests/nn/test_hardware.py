"""One answer to what a device multiplies in hardware, by the probes that torch has."""

import logging

import pytest
import torch

from smalto.nn import hardware
from smalto.nn.hardware import bf16_units, has_fast_bf16
from smalto.planning.device import measured_device
from smalto.sampling import packed
from smalto.sampling.engine import EngineConfig
from smalto.sampling.packed import resolve_dtype
from smalto.tokenizers.precision import use_bf16

CPUS = {
    "AMX": ({"amx_tile", "avx512_bf16"}, "AMX"),
    "AVX512-BF16 only": ({"avx512_bf16"}, "AVX512-BF16"),
    "AVX2 only": (set(), None),
}


@pytest.fixture
def machine(monkeypatch):
    """Makes this process believe in a processor, by name, or in a GPU, by capability."""

    def pretend(cpu: str = "AVX2 only", gpu: tuple[int, int] | None = None, onednn: bool = True) -> None:
        monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
        for unit in ("amx_tile", "avx512_bf16"):
            found = unit in CPUS[cpu][0]
            monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda found=found: found, raising=False)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
        monkeypatch.setattr(packed, "_has_onednn", lambda dtype: onednn)
        packed._say_once.cache_clear()

    yield pretend
    packed._say_once.cache_clear()


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("onednn", [True, False])
def test_engine_and_tokenizer_agree_on_a_processor(machine, cpu, onednn):
    machine(cpu, onednn=onednn)
    assert bf16_units("cpu") == CPUS[cpu][1]
    fast = CPUS[cpu][1] is not None
    assert has_fast_bf16("cpu") == use_bf16("auto", "cpu") == fast
    other = "fp16" if packed._has_fp16() else "fp32"
    assert EngineConfig().computes_in(torch.device("cpu")) == ("bf16" if fast and onednn else other)
    compiled = EngineConfig(compile=True).computes_in(torch.device("cpu"))
    assert compiled == ("bf16" if fast and onednn else "fp32")
    for dtype in ("fp32", "bf16", "int8", *(["fp16"] if packed._has_fp16() else [])):
        assert resolve_dtype(dtype, torch.device("cpu")) == dtype


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_engine_and_tokenizer_agree_on_a_gpu(machine, capability, fast):
    """CUDA emulates bfloat16 below 8.0. The device that is asked about counts, not the current one."""
    machine("AMX", gpu=capability)
    assert has_fast_bf16("cuda:1") == use_bf16("auto", "cuda:1") == fast
    assert resolve_dtype("auto", torch.device("cuda:1")) == ("bf16" if fast else "fp32")


def test_arm_is_asked_by_onednn(machine, monkeypatch):
    machine("AVX2 only")
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    for fast in (True, False):
        monkeypatch.setattr(hardware, "_arm_bf16", lambda fast=fast: fast)
        assert bf16_units("cpu") == ("Arm's bf16" if fast else None)
    monkeypatch.undo()
    assert isinstance(hardware._arm_bf16(), bool)


def test_devices_of_which_nobody_knows_have_none(machine):
    machine("AMX")
    for device in ("mps", "cuda"):
        assert not has_fast_bf16(device)
        assert resolve_dtype("auto", torch.device(device)) == "fp32"


def test_older_torch_has_no_probes(machine, monkeypatch):
    machine("AMX")
    for unit in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{unit}_supported")
    assert not has_fast_bf16("cpu")


def test_what_was_chosen_is_said_once_and_why(machine, caplog):
    machine("AVX512-BF16 only")
    caplog.set_level(logging.INFO)
    config = EngineConfig()
    assert not caplog.messages
    for _ in range(3):
        config.computes_in(torch.device("cpu"))
    resolve_dtype("fp32", torch.device("cpu"))
    assert caplog.messages == ["engine.dtype=auto is bf16 on cpu: bfloat16 in hardware (AVX512-BF16)"]
    machine("AMX", onednn=False)
    resolve_dtype("auto", torch.device("cpu"))
    assert "AMX, but no oneDNN kernel for it" in caplog.messages[-1]


def test_a_plan_of_this_machine_asks_the_same(machine):
    figures = {"memory_gib": 1, "fp32_tflops": 1, "half_tflops": 0.5, "bandwidth_gb_s": 1}
    for cpu in CPUS:
        machine(cpu)
        device = measured_device(**figures)
        assert device.bf16 == has_fast_bf16("cpu")
        assert device.peak_flops("bf16-mixed") == 0.5e12  # emulated or not, as measured
