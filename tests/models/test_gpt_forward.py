"""Training side of the GPT: what each logit may depend on, and what the loss is before anything is learned."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT


@pytest.fixture
def codes(generator) -> Tensor:
    return torch.randint(24, (3, 12), generator=generator)


@pytest.fixture
def label() -> Tensor:
    return torch.tensor([1, 7, 1])


def loss_of(net: GPT, codes: Tensor, condition: Tensor) -> Tensor:
    return F.cross_entropy(net(codes, condition).flatten(0, 1), codes.flatten())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_loss_starts_at_ln_v(make_gpt, codes, label, text, training, generator):
    net = make_gpt(text=text, random=False).train(training)
    condition = torch.randn(3, 5, 6, generator=generator) if text else label
    # The output layer starts at zero, so every code has probability 1 / 24; float32 rounds the logarithm.
    assert loss_of(net, codes, condition).item() == pytest.approx(math.log(24), abs=1e-6)


@pytest.mark.parametrize("t", [0, 5, 10])
def test_a_code_is_seen_by_later_positions_only(class_gpt, codes, label, t):
    other = codes.clone()
    other[:, t] = (other[:, t] + 1) % 24
    before, after = class_gpt(codes, label), class_gpt(other, label)
    # Same shapes, same kernels, weight exactly 0 on what is hidden: the bits agree.
    assert torch.equal(after[:, : t + 1], before[:, : t + 1])
    assert ((after - before)[:, t + 1 :].abs().amax(-1) > 1e-6).all()


def test_the_last_code_is_never_an_input(class_gpt, codes, label):
    other = codes.clone()
    other[:, -1] = (other[:, -1] + 1) % 24
    assert torch.equal(class_gpt(other, label), class_gpt(codes, label))


def test_every_position_sees_the_condition(class_gpt, codes):
    one, two = (class_gpt(codes, torch.full((3,), label)) for label in (1, 7))
    assert ((one - two).abs().amax(-1) > 1e-6).all()


def test_samples_do_not_see_each_other(class_gpt, codes, label):
    net = class_gpt.double()
    alone = torch.cat([net(codes[i : i + 1], label[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(codes, label), alone, atol=1e-12, rtol=0)  # float64, values of order 1


@pytest.fixture
def text(generator) -> Tensor:
    return torch.randn(3, 5, 6, generator=generator)


@pytest.fixture
def text_mask() -> Tensor:
    return torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)


def test_padding_is_invisible(text_gpt, codes, text, text_mask):
    other = torch.where(text_mask.unsqueeze(-1), text, torch.full_like(text, 9.0))
    assert torch.equal(text_gpt(codes, other, text_mask), text_gpt(codes, text, text_mask))
    assert not torch.equal(text_gpt(codes, other), text_gpt(codes, text))


def test_mask_of_all_valid_tokens_is_no_mask(text_gpt, codes, text):
    net = text_gpt.double()
    masked = net(codes, text.double(), torch.ones(3, 5, dtype=torch.bool))
    # Another attention kernel, in float64.
    torch.testing.assert_close(masked, net(codes, text.double()), atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only(class_gpt, codes, label):
    assert torch.equal(class_gpt.eval()(codes, label), class_gpt(codes, label))
    assert not torch.equal(class_gpt.train()(codes, label), class_gpt(codes, label))


@pytest.mark.parametrize("settings", [{"drop_path": 0.5}, {"attn_dropout": 0.5}, {"token_dropout": 0.5}])
def test_each_kind_of_dropout_acts(make_gpt, codes, label, settings):
    off = dict.fromkeys(("token_dropout", "attn_dropout", "resid_dropout", "ffn_dropout", "drop_path"), 0.0)
    conditioner = partial(ClassConditioner, num_classes=10, drop_prob=0.0)
    silent = make_gpt(conditioner=conditioner, **off).train()
    assert torch.equal(silent(codes, label), silent(codes, label))
    noisy = make_gpt(conditioner=conditioner, **off | settings).train()
    assert not torch.equal(noisy(codes, label), noisy(codes, label))


def test_drop_path_grows_linearly(make_gpt):
    net = make_gpt(num_layers=5, drop_path=0.4)
    assert [block.drop_path.drop_prob for block in net.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.parametrize("is_text", [True, False])
def test_every_parameter_learns(make_gpt, codes, label, text, is_text):
    net = make_gpt(text=is_text).train()
    for _ in range(20):  # often enough that some sample is dropped, for the null condition
        loss_of(net, codes, text if is_text else label).backward()
    still = [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert still == []


def test_initial_weights(make_gpt):
    net = make_gpt(random=False, dim=128, vocab_size=200, init_std=0.05)
    for name, parameter in net.named_parameters():
        if name == "output.weight":
            assert (parameter == 0).all()
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            # At least 1408 draws: the standard deviation is known to 2 %, six of them.
            assert parameter.std().item() == pytest.approx(0.05, rel=0.12), name


def test_meta_build_can_be_filled(make_gpt, codes, label):
    with torch.device("meta"):
        empty = make_gpt(random=False)
    net = empty.to_empty(device="cpu")
    net.rope.fill_(torch.nan)  # to_empty leaves whatever was in memory
    net.init_weights()
    fresh = make_gpt(random=False)
    assert torch.equal(net.rope, fresh.rope)
    torch.manual_seed(5)
    net.init_weights()
    torch.manual_seed(5)
    fresh.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))
    assert loss_of(net, codes, label).item() == pytest.approx(math.log(24), abs=1e-6)


def test_rotary_table_is_not_saved(class_gpt):
    assert class_gpt.state_dict().keys() == dict(class_gpt.named_parameters()).keys()


def test_low_precision_weights_give_low_precision_logits(class_gpt, codes, label):
    assert class_gpt(codes, label).dtype == torch.float32
    assert class_gpt.bfloat16()(codes, label).isfinite().all()


@pytest.mark.parametrize("code_shape", [(), ((4, 4), (8, 8)), ((16,),)])
def test_refuses_what_is_no_raster(make_gpt, code_shape):
    with pytest.raises(ValueError, match=r"code_shape.*one grid"):
        make_gpt(code_shape=code_shape)


def test_refuses_heads_that_do_not_divide(make_gpt):
    with pytest.raises(ValueError, match=r"dim \(32\).*num_heads \(5\)"):
        make_gpt(num_heads=5)
