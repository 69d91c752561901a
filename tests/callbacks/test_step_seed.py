from types import SimpleNamespace

import pytest
import torch

from smalto.callbacks.step_seed import StepSeed


def noise(*, seed: int = 3, epoch: int = 0, batch: int = 0, rank: int = 0) -> list[float]:
    """What a training step would draw."""
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    StepSeed(seed=seed).on_train_batch_start(trainer, None, None, batch)
    return torch.rand(4).tolist()


def test_noise_depends_on_the_step_only():
    first = noise(epoch=2, batch=7)
    torch.rand(100)  # another past: a run that was resumed, a validation in between
    noise(epoch=2, batch=6)
    assert noise(epoch=2, batch=7) == first


@pytest.mark.parametrize("other", [{"seed": 4}, {"epoch": 1}, {"batch": 1}, {"rank": 1}])
def test_every_part_matters(other):
    assert noise(**other) != noise()


def test_parts_are_not_simply_added():
    draws = [
        tuple(noise(seed=s, epoch=e, batch=b, rank=r)) for s in (0, 1) for e in (0, 1) for b in (0, 1) for r in (0, 1)
    ]
    assert len(set(draws)) == 16


def test_dropout_is_reproduced():
    layer = torch.nn.Dropout(0.5).train()
    noise(batch=5)
    first = layer(torch.ones(100))
    noise(batch=5)
    assert torch.equal(layer(torch.ones(100)), first)
