"""A machine that says it has one GPU: what torch.cuda answers, autocast, an accelerator for Lightning."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from gpu_rehearsal.findings import Findings
from gpu_rehearsal.pretend import CUDA, Beside, Device, Generator, pinned

ANSWERS: dict[str, Any] = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (8, 0),
    "get_device_name": "pretended",
    "is_bf16_supported": True,
    "max_memory_allocated": 2**30,
    "memory_allocated": 2**30,
    "memory_reserved": 2**30,
    "mem_get_info": (70 * 2**30, 80 * 2**30),
    "get_rng_state": torch.zeros(1, dtype=torch.uint8),
    "set_rng_state": None,
    "device": nullcontext(),
    "get_rng_state_all": [],
    "set_rng_state_all": None,
    "manual_seed": None,
    "manual_seed_all": None,
    "synchronize": None,
    "empty_cache": None,
    "set_device": None,
    "reset_peak_memory_stats": None,
}
"""Of ``torch.cuda``, whatever is asked."""

_autocast, _enabled, _dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype


class Autocast(_autocast):
    """That of the CPU, by whose dispatch keys the tensors go."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


class GPU(Accelerator):
    """One device, to Lightning."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [CUDA]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "gpu_rehearsal"


class OneGPU(SingleDeviceStrategy):
    """Lightning's, teardown included: it moves the model to the CPU."""

    def __init__(self) -> None:
        super().__init__(device=CUDA)


ON_GPU = ["trainer.accelerator={_target_: gpu_rehearsal.machine.GPU}"]
ON_GPU += ["trainer.strategy={_target_: gpu_rehearsal.machine.OneGPU}"]
"""Words for ``smalto train``."""


@contextmanager
def gpu(found: Findings) -> Iterator[Findings]:
    """Context in which this process has a GPU."""

    def asked(name: str) -> Any:
        return lambda *args, **kwargs: ANSWERS[name]

    def on_cpu(function: Any) -> Any:
        return lambda *args: function(*("cpu" if arg == "cuda" else arg for arg in args))

    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    with ExitStack() as stack:
        for name in ANSWERS:
            stack.enter_context(mock.patch.object(torch.cuda, name, asked(name)))
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch.amp, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", on_cpu(_enabled)))
        stack.enter_context(mock.patch.object(torch, "get_autocast_dtype", on_cpu(_dtype)))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pinned))
        # The compiled step has tests of its own (tests/sampling/test_compiled.py).
        stack.enter_context(mock.patch("smalto.sampling.engine._has_triton", return_value=False))
        # Counts operators of shapes alone, with another kind of tensors that are not real.
        stack.enter_context(mock.patch("smalto.tasks.tokenizer.forward_flops", return_value=1))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name))
        # A parameter cannot become another kind of tensor in its place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        device = stack.enter_context(Device(found))
        # What runs in the backward pass, such as blocks that are recomputed, names devices too.
        run_backward = torch.autograd.graph._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            with device, Beside():
                return run_backward(*args, **kwargs)

        stack.enter_context(mock.patch("torch.autograd._engine_run_backward", backward))
        yield found
