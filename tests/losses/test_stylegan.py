"""The StyleGAN-like discriminator: published size, the layout of the authors' files, its blur, what it judges."""

import itertools

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d

from smalto.losses.stylegan import Blur, StyleGANDiscriminator
from smalto.runtime import build, compose


def test_published_number_of_parameters(monkeypatch):
    monkeypatch.setenv("SMALTO_LAUNCHED_AT", "test")
    config = compose("train", ["task=tokenizer", "discriminator=stylegan", "run_dir=x"])
    with torch.device("meta"):
        net = build(config.discriminator)()
    assert sum(p.numel() for p in net.parameters()) == 36_500_225


def authors_layout() -> dict[str, list[int]]:
    """Names and shapes at 256 px: blocks 0 and 1 are the first convolution and its activation."""
    shapes = {"blocks.0.weight": [64, 3, 3, 3]}
    widths = [64, 128, 256, 512, 512, 512, 512]
    for i, (into, out) in enumerate(itertools.pairwise(widths), start=2):
        shapes |= {
            f"blocks.{i}.conv_res.weight": [out, into, 1, 1],
            f"blocks.{i}.net.0.weight": [out, into, 3, 3],
            f"blocks.{i}.net.2.weight": [out, out, 3, 3],
            f"blocks.{i}.downsample.1.weight": [out, out, 3, 3],
        }
    shapes |= {
        "final_conv.0.weight": [512, 512, 3, 3],
        "final_linear.0.weight": [512, 8192],
        "final_linear.2.weight": [1, 512],
    }
    shapes |= {name.replace("weight", "bias"): shape[:1] for name, shape in shapes.items()}
    return shapes | {f"blocks.{i}.downsample.0.f": [3] for i in range(2, 8)}


def test_names_and_shapes_are_those_of_the_authors_files():
    with torch.device("meta"):
        state = StyleGANDiscriminator(image_size=256).state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == authors_layout()


def test_blur_is_a_mirrored_binomial_filter():
    image = torch.randn(2, 5, 9, 7)
    kernel = np.array([0.25, 0.5, 0.25])
    expected = image.numpy()
    for axis in (2, 3):
        expected = correlate1d(expected, kernel, axis=axis, mode="mirror")  # the edge itself is not repeated
    torch.testing.assert_close(Blur()(image), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_one_block_by_hand():
    net = StyleGANDiscriminator(image_size=8)
    block = net.blocks[2]
    x = torch.randn(1, 512, 8, 8)
    with torch.no_grad():
        h = x
        for i in (0, 2):
            h = torch.nn.functional.conv2d(h, block.net[i].weight, block.net[i].bias, padding=1)
            h = torch.where(h > 0, h, 0.2 * h)
        h = Blur()(h)
        h = torch.nn.functional.conv2d(h, block.downsample[1].weight, block.downsample[1].bias, stride=2, padding=1)
        short = torch.einsum("oc,bchw->bohw", block.conv_res.weight[:, :, 0, 0], x[:, :, ::2, ::2])
        expected = (h + short + block.conv_res.bias[:, None, None]) * 0.5**0.5
        torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [8, 16])
def test_one_logit_per_image_that_depends_on_all_of_it(size):
    net = StyleGANDiscriminator(image_size=size).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, size, size, requires_grad=True)
    logits = net(image)
    assert logits.shape == (2, 1)
    logits[0].sum().backward()
    assert (image.grad[0].abs().sum(0) > 0).all()
    assert not image.grad[1].any()


@pytest.mark.parametrize("size", [4, 48, 2048])
def test_refuses_sizes_that_it_cannot_have(size):
    with pytest.raises(ValueError, match=f"image_size is {size}.*patchgan"):
        StyleGANDiscriminator(image_size=size)


def test_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"\(16, 16\) px for a discriminator of 8"):
        StyleGANDiscriminator(image_size=8)(torch.zeros(1, 3, 16, 16))
