"""The authors' layout: names of every published size, wrappers, prefixes, leftovers, inference of sizes."""

import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from official_files import gpt_shapes, tiny_gpt, tiny_text_gpt, tiny_tokenizer, tokenizer_shapes
from smalto.losses.patchgan import PatchDiscriminator
from smalto.losses.stylegan import StyleGANDiscriminator
from smalto.nn.mlp import swiglu_hidden_size
from smalto.tasks.official import arguments, kind_of, official_name, official_weights, plain_name, which_weights
from smalto.tasks.official_config import Hints, discriminator_node, gpt_node, tokenizer_node
from smalto.tasks.registry import factory

PATH = Path("x.pt")
# name: width, layers, heads, tensors with classes (two more with text)
SIZES = {
    "b": (768, 12, 12, 88),
    "l": (1024, 24, 16, 172),
    "xl": (1280, 36, 20, 256),
    "xxl": (1536, 48, 24, 340),
    "xxxl": (2560, 48, 40, 340),
    "1b": (2048, 22, 32, 158),
    "3b": (3200, 24, 32, 172),
    "7b": (4096, 32, 32, 228),
}
TOKENIZERS = {"vq16": ([1, 1, 2, 2, 4], 344), "vq8": ([1, 2, 2, 4], 300)}


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def official_shapes_of(node, kind):
    with torch.device("meta"):
        state = factory(node, kind, where=str(PATH))().state_dict()
    return {official_name(kind, name): list(value.shape) for name, value in state.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("condition", ["class", "text"])
def test_every_published_generator_is_told_from_its_tensors(size, condition):
    dim, layers, heads, tensors = SIZES[size]
    conditioning = {"classes": 1000} if condition == "class" else {"text_dim": 2048}
    shapes = gpt_shapes(dim=dim, layers=layers, hidden=swiglu_hidden_size(dim), vocab=16384, **conditioning)
    assert len(shapes) == tensors + 2 * (condition == "text")
    assert kind_of(shapes, PATH) == "gpt"
    node = gpt_node(on_meta(shapes), Hints(image_size=384), PATH)
    assert node["num_heads"] == heads
    assert node["code_shape"] == [[24, 24]]
    assert node["ffn_multiple_of"] == 256
    assert official_shapes_of(node, "gpt") == shapes


@pytest.mark.parametrize("name", TOKENIZERS)
def test_both_tokenizers_are_told_from_their_tensors(name):
    multipliers, tensors = TOKENIZERS[name]
    shapes = tokenizer_shapes(base=128, multipliers=multipliers, blocks=2, z=256, codes=16384, dim=8)
    assert len(shapes) == tensors
    assert kind_of(shapes, PATH) == "tokenizer"
    node = tokenizer_node(on_meta(shapes), Hints(), PATH)
    assert (node["channel_multipliers"], node["image_size"]) == (multipliers, 256)
    assert node["quantizer"]["l2_norm"] is True
    del shapes["quantize.codebook_used"]  # a queue of the authors' training, not part of the model
    assert official_shapes_of(node, "tokenizer") == shapes


def test_other_sizes_of_codebook_heads_and_width():
    shapes = tokenizer_shapes(base=64, multipliers=[1, 2, 3], blocks=3, z=48, codes=1024, dim=32)
    node = tokenizer_node(on_meta(shapes), Hints(image_size=128, l2_norm=False), PATH)
    assert node["quantizer"] | {"_target_": ""} == {
        "_target_": "",
        "_partial_": True,
        "codebook_size": 1024,
        "codebook_dim": 32,
        "l2_norm": False,
    }
    assert official_shapes_of(node, "tokenizer").items() <= shapes.items()
    grouped = gpt_shapes(dim=400, layers=2, hidden=1088, vocab=50, classes=33, qkv=(4 + 2 * 2) * 100)
    node = gpt_node(on_meta(grouped), Hints(image_size=112, num_heads=4), PATH)
    assert (node["num_kv_heads"], node["code_shape"], node["ffn_multiple_of"]) == (2, [[7, 7]], 64)
    assert node["conditioner"]["num_classes"] == 33
    assert official_shapes_of(node, "gpt") == grouped


def test_what_tensors_do_not_show_is_asked_for_at_once():
    with pytest.raises(ValueError, match=r"give image_size=PIXELS.* and num_heads=N \(width 32 with 2 layers"):
        gpt_node(tiny_gpt(), Hints(), PATH)
    with pytest.raises(ValueError, match=r"give image_size=384"):  # a suggestion by the name, not an assumption
        gpt_node(tiny_gpt(), Hints(num_heads=2), Path("c2i_B_384.pt"))


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (Hints(image_size=100, num_heads=4), "image_size is 100, it must be a multiple of downsample_factor"),
        (Hints(image_size=64, num_heads=3), "num_heads is 3, 32 / num_heads must be a multiple of 4"),
        (Hints(image_size=64, num_heads=16), "num_heads is 16"),
    ],
)
def test_hints_that_cannot_be(hints, message):
    with pytest.raises(ValueError, match=message):
        gpt_node(tiny_gpt(), hints, PATH)


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_and_prefixes(wrapper, prefix):
    weights = tiny_gpt()
    named = {prefix + name: value for name, value in weights.items()}
    content = named if wrapper is None else {wrapper: named, "optimizer": {"state": {}}, "steps": 3}
    found = official_weights(content, which=which_weights(content), path=PATH)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_prefixes_inside_names_and_leftovers():
    assert plain_name("layers.3._fsdp_wrapped_module.ffn_norm.weight") == "layers.3.ffn_norm.weight"
    extra = {
        "freqs_cis": torch.zeros(3, 2),
        "layers.0.attention.kv_cache.k_cache": torch.zeros(2),
        "layers.0.attention.kv_cache.v_cache": torch.zeros(2),
        "layers.1.attention.freqs_cis": torch.zeros(2),
    }
    assert official_weights({"model": tiny_gpt() | extra}, which="model", path=PATH).keys() == tiny_gpt().keys()


def test_the_trained_weights_are_taken_unless_the_average_is_asked_for_or_alone():
    trained = tiny_tokenizer()
    average = {name: value + 1 for name, value in trained.items() if name != "quantize.codebook_used"}
    content = {"model": trained, "ema": average}
    assert (which_weights(content), which_weights({"ema": average}), which_weights(trained)) == (
        "model",
        "ema",
        "model",
    )
    for which, shift in (("ema", 1), ("model", 0)):
        found = official_weights(content, which=which, path=PATH)
        assert torch.equal(found["encoder.conv_in.bias"], trained["encoder.conv_in.bias"] + shift)
        assert torch.equal(found["quantize.codebook_used"], trained["quantize.codebook_used"]), "buffers are no average"
    with pytest.raises(ValueError, match=r"no averaged weights.*weights=model"):
        official_weights({"model": trained}, which="ema", path=PATH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list"),
        ({}, "holds an empty dict"),
        ({"model": {"a": 3}}, "a are not tensors"),
        ({"epoch": 3, "loss": 0.1}, "epoch, loss are not tensors"),
        ({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "holds a twice"),
    ],
)
def test_content_without_weights(content, message):
    with pytest.raises(ValueError, match=message):
        official_weights(content, which=which_weights(content), path=PATH)


def test_a_foreign_network_is_named():
    with pytest.raises(ValueError, match=r"neither a tokenizer nor a generator.*visual.proj, text.proj"):
        kind_of(["visual.proj", "text.proj"], PATH)


def test_arguments_of_the_training_run():
    assert arguments({"args": Namespace(image_size=384)}) == {"image_size": 384}
    assert arguments({"args": "image_size=384"}) == arguments({}) == {}


def test_discriminators():
    for net in (
        PatchDiscriminator(base_channels=8, num_layers=3),
        PatchDiscriminator(base_channels=4, num_layers=1),
        StyleGANDiscriminator(image_size=64),
    ):
        with torch.device("meta"):
            again = factory(discriminator_node(net.state_dict(), PATH), "discriminator", where=str(PATH))()
        assert {n: v.shape for n, v in again.state_dict().items()} == {n: v.shape for n, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="neither PatchGAN nor StyleGAN"):
        discriminator_node({"a": torch.zeros(1)}, PATH)


def test_text_generator_of_any_width():
    node = gpt_node(tiny_text_gpt(), Hints(image_size=64, num_heads=2), PATH)
    assert (node["conditioner"]["text_dim"], node["conditioner"]["num_tokens"]) == (6, 120)
    assert official_shapes_of(node, "gpt") == {name: list(v.shape) for name, v in tiny_text_gpt().items()}


def test_names_of_any_length_are_plain_at_once():
    """Prefixes were taken away one by one: a name of a megabyte took seven seconds."""
    began = time.process_time()
    assert plain_name("module." * 200_000 + "layers.0.module.x") == "layers.0.module.x"
    assert time.process_time() - began < 1
