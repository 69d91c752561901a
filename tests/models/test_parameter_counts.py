"""The sizes that the paper and the authors' code give, from the YAML that builds them; nothing is allocated."""

import pytest
import torch
from torch import nn

from smalto import runtime

# With 1000 classes and 16384 codes.
CLASS_CONDITIONAL = {
    "b": 110_888_448,
    "l": 342_910_976,
    "xl": 774_699_520,
    "xxl": 1_410_972_672,
    "3b": 3_096_659_200,
    "xxxl": 3_893_027_840,
    "1b": 1_199_616_000,
    "7b": 6_614_589_440,
}
# 120 Flan-T5-XL tokens of 2048 channels; the null features come on top, the authors hold them in a buffer.
TEXT_CONDITIONAL = {
    "b": 112_282_368,
    "l": 345_031_680,
    "xl": 777_678_080,
    "xxl": 1_414_940_160,
    "3b": 3_110_249_600,
    "xxxl": 3_902_261_760,
    "1b": 1_205_954_560,
    "7b": 6_635_655_168,
}
NULL_FEATURES = 120 * 2048
TOKENIZERS = {"vq_f16": (71_883_403, (16, 16)), "vq_f8": (70_109_835, (32, 32))}


@pytest.fixture
def on_meta(monkeypatch):
    """Builds a node of ``conf/train.yaml`` on the meta device."""
    monkeypatch.setenv("SMALTO_LAUNCHED_AT", "test")

    def build(node: str, *overrides: str) -> nn.Module:
        config = runtime.compose("train", ["run_dir=x", *overrides])
        with torch.device("meta"):
            return runtime.build(config[node])()

    return build


def count(net: nn.Module) -> int:
    assert all(p.is_meta for p in net.parameters())
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("model", "parameters"), CLASS_CONDITIONAL.items())
def test_class_conditional(on_meta, model, parameters):
    net = on_meta("model", f"model={model}")
    assert count(net) == parameters
    assert net.code_shape == ((16, 16),)


@pytest.mark.parametrize(("model", "parameters"), TEXT_CONDITIONAL.items())
def test_text_conditional(on_meta, model, parameters):
    net = on_meta("model", f"model={model}", "conditioner=text")
    assert count(net) == parameters + NULL_FEATURES
    assert net.conditioner.null_features.numel() == NULL_FEATURES


@pytest.mark.parametrize(("tokenizer", "expected"), TOKENIZERS.items())
def test_tokenizers(on_meta, tokenizer, expected):
    net = on_meta("tokenizer", f"tokenizer={tokenizer}")
    assert (count(net), net.code_shape[0]) == expected
    assert net.codebook_size == 16_384


def test_vocabulary_and_grid_follow_the_tokenizer(on_meta):
    net = on_meta("model", "tokenizer=vq_f8", "tokenizer.quantizer.codebook_size=4096", "image_size=128")
    assert (net.vocab_size, net.code_shape) == (4096, ((16, 16),))


def test_discriminator(on_meta):
    assert count(on_meta("discriminator")) == 2_765_633
