"""Arithmetic of a network, from its own layers: nothing is computed."""

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def forward_flops(net: nn.Module, *inputs: Tensor) -> int:
    """Of one forward pass in evaluation mode, a multiply-add as two; matrix products and convolutions only.

    The network runs with fake tensors of the shapes of its weights: no memory, no time, no effect on the net.

    Args:
        net: on any device, or with weights that are fake already.
        inputs: of which only shape and dtype count.
    """
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    training = net.training
    net.eval()
    try:
        # Weights become fake where they are met, also those that a network keeps out of its state. The kernels of
        # attention on CPUs are unknown to the counter; plain products are not.
        modes = (p.fake_mode for p in net.parameters() if isinstance(p, FakeTensor))
        fake = next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)
        with fake, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            net(*(torch.empty(x.shape, dtype=x.dtype, device=device) for x in inputs))
    finally:
        net.train(training)
    return counter.get_total_flops()
