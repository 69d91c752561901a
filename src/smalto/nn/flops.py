"""Arithmetic of a network, from its own layers: nothing is computed."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(net: nn.Module, *inputs: Tensor) -> int:
    """Of one forward pass in evaluation mode, a multiply-add as two; matrix products and convolutions only.

    The network runs with fake tensors of the shapes of its weights: no memory, no time, no effect on the net.

    Args:
        net: on any device.
        inputs: of which only shape and dtype count.
    """
    tensors = [*net.named_parameters(), *net.named_buffers()]
    training = net.training
    net.eval()
    try:
        # the kernels of attention on CPUs are unknown to the counter; plain products are not
        with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            state = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors}
            functional_call(net, state, tuple(torch.empty(x.shape, dtype=x.dtype) for x in inputs))
    finally:
        net.train(training)
    return counter.get_total_flops()
