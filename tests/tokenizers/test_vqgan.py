import pytest
import torch

from smalto.nn.conv import SpatialAttention
from smalto.types import ImageTokenizer


@pytest.fixture
def image(generator):
    return 2 * torch.rand(3, 3, 16, 16, generator=generator) - 1


@pytest.mark.parametrize(
    ("multipliers", "side"), [((1,), 16), ((1, 2), 8), ((1, 1, 2), 4), ((1, 1, 1, 2), 2), ((1, 1, 1, 1, 2), 1)]
)
def test_shapes_there_and_back(make_vq, image, multipliers, side):
    net = make_vq(channel_multipliers=multipliers)
    assert net.code_shape == ((side, side),)
    codes = net.encode(image)
    assert codes.shape == (3, side * side)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < net.codebook_size
    assert net.decode(codes).shape == image.shape


@pytest.mark.parametrize("l2_norm", [True, False])
def test_decoding_the_codes_is_the_reconstruction(make_vq, image, l2_norm):
    net = make_vq(l2_norm=l2_norm)
    reconstruction, quantized = net(image)
    assert torch.equal(quantized.codes, net.encode(image))
    # The straight-through sum z + (q - z) rounds once more than the look-up, and convolutions pass that on.
    torch.testing.assert_close(net.decode(quantized.codes), reconstruction, atol=1e-5, rtol=1e-5)


def test_is_an_image_tokenizer(vq_model):
    assert isinstance(vq_model, ImageTokenizer)


def test_images_do_not_influence_each_other(vq_model, image):
    alone = torch.cat([vq_model.double().encode(one.double().unsqueeze(0)) for one in image])
    assert torch.equal(vq_model.encode(image.double()), alone)


def test_levels_halve_the_plane(vq_model, image):
    sides = []
    hooks = [
        level.register_forward_hook(lambda _, args, out: sides.append((args[0].shape[-1], out.shape[-1])))
        for level in [*vq_model.encoder.levels, *vq_model.decoder.levels]
    ]
    vq_model(image)
    for hook in hooks:
        hook.remove()
    assert sides == [(16, 8), (8, 4), (4, 4), (4, 8), (8, 16), (16, 16)]


def test_only_the_lowest_level_attends(vq_model):
    attending = [name for name, module in vq_model.named_modules() if isinstance(module, SpatialAttention)]
    assert attending == [
        "encoder.levels.2.attention.0",
        "encoder.middle.1",
        "decoder.middle.1",
        "decoder.levels.0.attention.0",
        "decoder.levels.0.attention.1",
    ]


def test_weights_fit_other_resolutions(make_vq, vq_model, generator):
    larger = make_vq(image_size=24)
    larger.load_state_dict(vq_model.state_dict())
    codes = larger.encode(2 * torch.rand(1, 3, 24, 24, generator=generator) - 1)
    assert codes.shape == (1, 36)
    assert larger.decode(codes).shape == (1, 3, 24, 24)


def test_every_parameter_learns(vq_model, image):
    reconstruction, quantized = vq_model.train()(image)
    ((reconstruction - image).pow(2).mean() + quantized.loss).backward()
    still = {name for name, p in vq_model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    # A constant added to all keys shifts all scores of a query alike: the softmax does not see it.
    assert all(name.endswith(".k.bias") for name in still)
    assert vq_model.last_layer is vq_model.decoder.conv_out.weight


@pytest.mark.parametrize("image_size", [0, 2, 18])
def test_refuses_sizes_that_the_stride_does_not_divide(make_vq, image_size):
    with pytest.raises(ValueError, match=rf"image_size is {image_size}; .* stride 4 needs a multiple of 4"):
        make_vq(image_size=image_size)


def test_refuses_codes_of_another_grid(vq_model):
    with pytest.raises(ValueError, match=r"15 codes per image were given.*4 x 4 = 16"):
        vq_model.decode(torch.zeros(2, 15, dtype=torch.int64))


def test_refuses_widths_that_cannot_be_normalised(make_vq):
    with pytest.raises(ValueError, match="norm_groups"):
        make_vq(base_channels=6)
