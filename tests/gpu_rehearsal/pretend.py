"""Tensors that say they are on a GPU and compute on the CPU: where a GPU would fail or wait is an error, or noted.

A :class:`OnDevice` tensor holds ordinary memory, so that loops, callbacks and metrics run to their end with real
values; to Python its device is ``cuda:0``. Every operator passes :meth:`OnDevice.__torch_dispatch__`, forward and
backward, which refuses what mixes it with tensors of the host. Calls that name a device pass :class:`Device` first.
What is not pretended: kernels of a GPU, their rounding and memory; autocast is that of the CPU.
"""

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_map, tree_map_only

from gpu_rehearsal.findings import FETCH, GENERATOR, MIXED, SEND, DeviceError, Findings

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

WAITS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::allclose", "aten::nonzero"),
    *("aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"),
    *("aten::repeat_interleave", "aten::_assert_scalar", "aten::argwhere"),
}
"""Operators whose results, or their shapes, the host has to wait for."""
HOST_METHODS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__),
    *(Tensor.__array__, Tensor.__contains__),
}
NAMES = {torch.device, torch._C._nn._parse_to, torch.get_autocast_dtype, torch.is_autocast_enabled}
"""What takes the name of a device and makes no tensor."""

findings = Findings()
"""Of the rehearsal that runs; replaced by :class:`Device`."""


def on_device(tree: Any) -> bool:
    """Whether any tensor in it says that it is on the GPU."""
    return tree_any(lambda x: isinstance(x, OnDevice), tree)


class OnDevice(Tensor):
    """See the module."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "OnDevice":
        elem = elem.elem if isinstance(elem, OnDevice) else elem.detach()
        made = Tensor._make_subclass(cls, elem, elem.requires_grad)
        made.elem = elem.detach()
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.elem!r})"

    def __deepcopy__(self, memo: dict) -> "OnDevice":
        copied = OnDevice(self.elem.clone()).requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        findings.note(FETCH, "pickle")
        return self.elem.__reduce_ex__(protocol)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        check(func, name, args, kwargs)
        if "device" in kwargs:  # of C++, which knows the CPU only; what Python asks for is the function mode's
            kwargs["device"] = CPU
        result = func(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name == "aten::_local_scalar_dense":
            return result
        written = written_to(func, args, kwargs)
        if written is not None:
            return written
        return tree_map_only(Tensor, OnDevice, result)


def bare(value: Any) -> Any:
    """The memory of the host behind a tensor."""
    return value.elem if isinstance(value, OnDevice) else value


def written_to(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments that ``func`` changes in place and returns; None if it returns new tensors."""
    places = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            places.append(kwargs[argument.name] if argument.name in kwargs else args[i] if i < len(args) else None)
    returns = func._schema.returns
    kept = [p for p in places if p is not None]
    if not kept or not any(r.alias_info is not None and r.alias_info.is_write for r in returns):
        return None
    return kept[0] if len(returns) == 1 else tuple(kept)


def check(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Note what waits, refuse what mixes."""
    if name in WAITS:
        findings.note(FETCH, name.removeprefix("aten::"))
    flat = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    host = [x for x in flat if not isinstance(x, OnDevice) and x.dim() > 0 and x.numel() > 0]
    if name in ("aten::index", "aten::index_put_", "aten::index_put"):
        indices = [x for x in args[1] if x is not None]
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            findings.note(FETCH, "index by a mask")
        elif any(not isinstance(x, OnDevice) for x in indices):
            findings.note(SEND, "index")
    elif name == "aten::copy_":
        target, source = args[:2]
        if isinstance(target, OnDevice) and not isinstance(source, OnDevice):
            sent(source, bool(args[2]) if len(args) > 2 else bool(kwargs.get("non_blocking")))
        elif isinstance(source, OnDevice) and not isinstance(target, OnDevice):
            findings.note(FETCH, "copy_")
    elif host:
        findings.note(MIXED, name)
        raise DeviceError(f"{name} of tensors on cuda:0 and on the CPU: {[(type(x).__name__, *x.shape) for x in flat]}")
    generator = kwargs.get("generator")
    if generator is not None and not getattr(generator, "on_device", False):
        findings.note(GENERATOR, name)
        raise DeviceError(f"{name} on cuda:0 with a generator of the CPU")


def sent(source: Tensor, non_blocking: bool) -> None:
    """Note a copy to the device that is waited for."""
    if not (non_blocking and getattr(source, "pretended_pinned", False)):
        findings.note(SEND, f"{tuple(source.shape)} {str(source.dtype).removeprefix('torch.')}")


class Generator(torch.Generator):
    """A generator that knows which device it was made for."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        made = super().__new__(cls)
        made.on_device = torch.device(device).type == "cuda"
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    device = property(lambda self: CUDA if self.on_device else CPU)  # type: ignore[assignment]


def grouped_by_torch() -> bool:
    """Whether an optimizer or the clipping of gradients asks: they group tensors in C++, which sees the CPU."""
    frame = sys._getframe(3)
    return any(part in frame.f_code.co_filename for part in ("/torch/optim/", "/torch/nn/utils/"))


def is_cuda(value: Any) -> bool:
    """Whether an argument names the GPU."""
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.startswith("cuda")
    )


class Device(TorchFunctionMode):
    """Context in which calls that name ``cuda`` make :class:`OnDevice` tensors; what waits goes into ``found``."""

    def __init__(self, found: Findings) -> None:
        super().__init__()
        self.found = found

    def __enter__(self) -> "Device":
        global findings
        self._before, findings = findings, self.found
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global findings
        super().__exit__(*error)
        findings = self._before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in NAMES:
            return func(*args, **kwargs)
        if func in HOST_METHODS and args and isinstance(args[0], OnDevice):
            return self._to_host(func, args, kwargs)
        if func is Tensor.cpu and isinstance(args[0], OnDevice):
            return self._moved(Tensor.to, (args[0], CPU), {})
        if func in (Tensor.to, Tensor.cuda, Tensor.type_as):
            return self._moved(func, args, kwargs)
        if is_cuda(kwargs.get("device")) or any(map(is_cuda, args)):
            return self._made(func, args, kwargs)
        if not isinstance(func, FunctionType) and on_device((args, kwargs)):
            with Beside():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _to_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        findings.note(FETCH, func.__name__)
        if func in (Tensor.numpy, Tensor.__array__):
            raise DeviceError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
        return func(args[0].elem, *args[1:], **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        if func is Tensor.cuda:
            rest, kwargs = [CUDA], {}
        target = kwargs.get("device", rest[0] if rest else None)
        if isinstance(target, Tensor):
            device = target.device
            rest[0:1] = [device, target.dtype]
        elif isinstance(target, (str, torch.device)):
            device = torch.device(target)
        else:
            return Tensor.to(tensor, *rest, **kwargs)
        here = isinstance(tensor, OnDevice)
        if device.type not in ("cuda", "cpu"):
            return Tensor.to(tensor, *rest, **kwargs)
        if "device" in kwargs:
            kwargs["device"] = CPU
        else:
            rest[0] = CPU
        if device.type == "cuda":
            if here:
                dtype = next((x for x in (*rest, *kwargs.values()) if isinstance(x, torch.dtype)), tensor.dtype)
                layout = kwargs.get("memory_format", torch.preserve_format)
                return Tensor.to(tensor, dtype=dtype, copy=kwargs.get("copy", False), memory_format=layout)
            words = [x for x in rest if isinstance(x, bool)]
            sent(tensor, bool(kwargs.get("non_blocking", words[0] if words else False)))
            return _Send.apply(Tensor.to(tensor, *rest, **kwargs))
        if device.type == "cpu" and here and grouped_by_torch():
            return tensor
        if device.type == "cpu" and here:
            findings.note(FETCH, "copy to the host")
            return _Fetch.apply(tensor).to(*rest, **kwargs)
        return Tensor.to(tensor, *rest, **kwargs)

    def _made(self, func: Any, args: Any, kwargs: Any) -> Any:
        generator = kwargs.get("generator")
        if generator is not None and not getattr(generator, "on_device", False):
            findings.note(GENERATOR, getattr(func, "__name__", str(func)))
            raise DeviceError(f"{func.__name__}(device=cuda) with a generator of the CPU")
        on_host = tree_map(lambda x: CPU if is_cuda(x) else x, (args, kwargs))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            findings.note(SEND, f"{func.__name__}(...)")
        result = func(*on_host[0], **on_host[1])
        grad = on_host[1].get("requires_grad", False)
        return tree_map_only(Tensor, lambda x: OnDevice(x.detach()).requires_grad_(grad), result)


def pinned(tensor: Tensor, device: Any = None) -> Tensor:
    """In place of ``Tensor.pin_memory``, in every thread."""
    made = tensor.clone()
    made.pretended_pinned = True  # type: ignore[attr-defined]
    return made


class Beside(TorchDispatchMode):
    """Tensors that an operator makes for itself, as a causal mask, lie where its arguments are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and not isinstance(result, OnDevice) and not tree_any(is_tensor, (args, kwargs)):
            return OnDevice(result)
        return result


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return OnDevice(tensor.clone() if tensor.requires_grad else tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return bare(grads[0])


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return bare(tensor).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return OnDevice(grads[0])
