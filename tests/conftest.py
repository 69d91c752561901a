"""Tiny networks of the real architectures, shared by all tests."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from forked_ranks import apart
from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.tokenizers.quantize import VectorQuantizer
from smalto.tokenizers.vqgan import VQModel


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that fork come first: a process that has compiled, or pretended devices, has no forks that could train."""
    forking = {path: forks(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: not forking[item.path])


def forks(path: Path) -> bool:
    """Whether a file of tests forks."""
    source = path.read_text(encoding="utf-8") if path.suffix == ".py" else ""
    return any(word in source for word in ("forked_ranks", "mark.apart", 'get_context("fork")', "os.fork"))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Tests marked ``apart`` run in a process of their own."""
    if pyfuncitem.get_closest_marker("apart") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    try:
        apart(lambda: pyfuncitem.obj(**arguments))
    except AssertionError as failed:
        pytest.fail(str(failed), pytrace=False)
    return True


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
