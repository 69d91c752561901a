"""The dropout that was on in the authors' training: off unless asked for, and only while the parent trains."""

import pytest
import torch
from torch import nn

from smalto.losses.perceptual import PerceptualLoss


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    return x, y


def test_off_by_default_in_training_too():
    loss = PerceptualLoss(net="squeeze_caffe").train()
    assert torch.equal(loss(*pair()), loss(*pair()))
    assert torch.equal(loss(*pair()), loss.eval()(*pair()))


def test_on_while_the_parent_trains_with_the_right_mean():
    loss = PerceptualLoss(net="squeeze_caffe", dropout=0.5)
    parent = nn.ModuleList([loss])
    exact = PerceptualLoss(net="squeeze_caffe")(*pair())
    parent.eval()
    assert torch.equal(loss(*pair()), exact)
    parent.train()
    draws = torch.stack([loss(*pair()) for _ in range(100)])
    assert draws.std(0).min() > 0
    # Survivors are doubled, so the mean stays; it is known to a tenth of the spread.
    assert ((draws.mean(0) - exact).abs() < 4 * draws.std(0) / 10).all()
    parent.eval()
    assert torch.equal(loss(*pair()), exact)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_refuses_what_is_no_probability(dropout):
    with pytest.raises(ValueError, match=f"dropout is {dropout}"):
        PerceptualLoss(net="squeeze_caffe", dropout=dropout)
