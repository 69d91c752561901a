"""Tiny networks of the real architectures, shared by all tests."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.tokenizers.quantize import VectorQuantizer
from smalto.tokenizers.vqgan import VQModel

# The first backward pass of a process decides whether autograd starts threads, which no fork survives. Here, before
# anything has been registered that looks like another device, it starts none, and tests may fork ranks that train.
torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Initial weights and dropout are the same in every run and in every order of tests."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def randomize(net: nn.Module) -> None:
    """Draw all weights so that signals keep order 1: a fresh GPT has a zero output layer, all its logits are equal."""
    for parameter in net.parameters():
        parameter.normal_()
        if parameter.dim() > 1:
            parameter.div_(parameter[0].numel() ** 0.5)
        else:
            parameter.mul_(0.1).add_(1)


@pytest.fixture
def make_gpt() -> Callable[..., GPT]:
    """Makes a GPT of 12 codes (3 x 4) out of 24, in eval mode, class-conditional or with ``text=True``."""

    def make(*, text: bool = False, random: bool = True, **overrides: object) -> GPT:
        conditioner = (
            partial(TextConditioner, text_dim=6, num_tokens=5, drop_prob=0.1)
            if text
            else partial(ClassConditioner, num_classes=10, drop_prob=0.1)
        )
        settings = {
            "dim": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 24,
            "code_shape": ((3, 4),),
            "conditioner": conditioner,
            "ffn_multiple_of": 16,
        }
        net = GPT(**settings | overrides)
        if random:
            randomize(net)
        return net.eval()

    return make


@pytest.fixture
def class_gpt(make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt()


@pytest.fixture
def text_gpt(make_gpt: Callable[..., GPT]) -> GPT:
    return make_gpt(text=True)


@pytest.fixture
def make_vq() -> Callable[..., VQModel]:
    """Makes a tokenizer of 16-px images with stride 4 and 32 codes, in eval mode."""

    def make(*, l2_norm: bool = True, **overrides: object) -> VQModel:
        settings = {
            "image_size": 16,
            "base_channels": 8,
            "channel_multipliers": (1, 1, 2),
            "quantizer": partial(VectorQuantizer, codebook_size=32, codebook_dim=4, l2_norm=l2_norm),
            "z_channels": 8,
            "num_res_blocks": 1,
            "norm_groups": 4,
        }
        return VQModel(**settings | overrides).eval()

    return make


@pytest.fixture
def vq_model(make_vq: Callable[..., VQModel]) -> VQModel:
    return make_vq()
