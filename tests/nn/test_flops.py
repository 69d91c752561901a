import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from smalto.nn.flops import forward_flops


def test_known_layers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 5)).train()
    assert forward_flops(net, torch.empty(2, 3, 4, 4)) == 2 * (2 * 16 * 8 * 27 + 2 * 128 * 5)
    assert net.training
    assert all(p.device.type == "cpu" and p.grad is None for p in net.parameters())


def test_a_tokenizer_counts_as_it_runs(make_vq):
    net = make_vq()
    image = torch.zeros(2, 3, net.image_size, net.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    # the codebook goes in chunks on a real device
    assert abs(forward_flops(net, image) / counter.get_total_flops() - 1) < 0.02


def test_a_network_that_hides_its_weights():
    """As the perceptual network does, to stay out of checkpoints."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = [nn.Linear(6, 4)]

        def forward(self, x):
            return self.inner[0](x)

    assert forward_flops(Hidden(), torch.empty(3, 6)) == 2 * 3 * 6 * 4
