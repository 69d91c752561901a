import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from smalto.nn.live_memory import LiveBytes


def work(live):
    a = torch.ones(100, 10)  # 4000 bytes
    b = a.t()  # a view
    c = a @ b  # 40000
    assert live.live == 44_000
    c.add_(1)
    assert live.live == 44_000
    live.set_aside(c)
    assert (live.live, live.aside) == (4_000, 40_000)
    del c
    assert (live.live, live.aside, live.peak, live.peak_of_all) == (4_000, 0, 44_000, 44_000)
    live.restart()
    del a
    assert live.live == 4_000, "the view still holds the storage"
    del b
    assert (live.live, live.peak) == (0, 4_000)


def test_every_storage_counts_once_while_somebody_holds_it():
    with LiveBytes() as live:
        work(live)
    with FakeTensorMode(), LiveBytes() as live:
        work(live)


def test_what_was_there_before_does_not_count_but_what_autograd_keeps_does():
    weight = torch.ones(10, 10, requires_grad=True)
    with LiveBytes() as live:
        weight.t().exp().sum().backward()
        assert live.live == weight.grad.nbytes
        kept = weight.exp()
        assert live.live == weight.grad.nbytes + 400
        loss = kept.sum()
        del kept  # exp keeps its result for the backward pass
        assert live.live == weight.grad.nbytes + 404
        loss.backward()
    assert live.peak <= 3 * 400 + 12
