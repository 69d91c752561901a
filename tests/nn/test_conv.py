import pytest
import torch
import torch.nn.functional as F

from smalto.nn.conv import Downsample, Normalize, ResnetBlock, SpatialAttention, Upsample, silu


def with_single_tap(layer, row: int, column: int):
    """The 3x3 kernel that copies the pixel under one of its taps."""
    channels = layer.conv.weight.shape[0]
    layer.conv.weight.data.zero_()
    layer.conv.weight.data[range(channels), range(channels), row, column] = 1
    layer.conv.bias.data.zero_()
    return layer


def test_downsample_pads_right_and_bottom_only(generator):
    x = torch.randn(2, 3, 6, 6, generator=generator)
    assert torch.equal(with_single_tap(Downsample(3), 0, 0)(x), x[:, :, ::2, ::2])
    beyond = with_single_tap(Downsample(3), 2, 2)(x)
    assert torch.equal(beyond[:, :, :-1, :-1], x[:, :, 2::2, 2::2])
    assert (beyond[:, :, -1] == 0).all()
    assert (beyond[..., -1] == 0).all()


def test_upsample_repeats_pixels(generator):
    x = torch.randn(2, 3, 4, 5, generator=generator)
    doubled = with_single_tap(Upsample(3), 1, 1)(x)
    assert torch.equal(doubled, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("out_channels", [8, 16])
def test_residual_block_without_its_branch_is_the_shortcut(out_channels, generator):
    block = ResnetBlock(8, out_channels, norm_groups=4)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    x = torch.randn(2, 8, 5, 5, generator=generator)
    assert torch.equal(block(x), block.shortcut(x))
    assert isinstance(block.shortcut, torch.nn.Identity) == (out_channels == 8)


def test_residual_block_by_definition(generator):
    block = ResnetBlock(8, 16, norm_groups=2)
    x = torch.randn(2, 8, 5, 5, generator=generator)
    h = block.conv1(F.silu(F.group_norm(x, 2, eps=1e-6)))  # fresh normalisations have scale 1 and shift 0
    h = block.conv2(F.silu(F.group_norm(h, 2, eps=1e-6)))
    torch.testing.assert_close(block(x), block.shortcut(x) + h)


def test_spatial_attention_by_definition(generator):
    layer = SpatialAttention(8, norm_groups=4).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, generator=generator)
    q, k, v = (conv(layer.norm(x)).flatten(2) for conv in (layer.q, layer.k, layer.v))
    weights = (torch.einsum("bci,bcj->bij", q, k) * 8**-0.5).softmax(-1)
    attended = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    torch.testing.assert_close(layer(x), x + layer.proj(attended), atol=1e-12, rtol=1e-12)


def test_spatial_attention_knows_no_positions(generator):
    layer = SpatialAttention(8, norm_groups=4).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, generator=generator)
    order = torch.randperm(12, generator=generator)
    shuffled = layer(x.flatten(2)[..., order].view_as(x))
    torch.testing.assert_close(shuffled.flatten(2), layer(x).flatten(2)[..., order], atol=1e-12, rtol=1e-12)


def test_refuses_widths_that_groups_do_not_divide():
    with pytest.raises(ValueError, match=r"24 channels.*32 groups.*base_channels"):
        Normalize(24)


def test_silu_works_in_place_only_where_no_gradient_needs_its_input():
    x = torch.randn(5)
    wanted = torch.nn.functional.silu(x)
    kept = x.clone().requires_grad_()
    assert torch.equal(silu(kept), wanted)
    assert torch.equal(kept, x)
    with torch.no_grad():
        assert torch.equal(silu(x), wanted)
    assert torch.equal(x, wanted)
