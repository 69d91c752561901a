import pytest
import torch

from smalto.losses.patchgan import PatchDiscriminator


@pytest.mark.parametrize(
    ("num_layers", "image_size", "patches"), [(3, 256, 30), (3, 24, 1), (2, 64, 14), (2, 12, 1), (1, 32, 14), (1, 6, 1)]
)
def test_number_of_patches(num_layers, image_size, patches):
    with torch.device("meta"):
        net = PatchDiscriminator(base_channels=4, num_layers=num_layers)
        assert net(torch.empty(2, 3, image_size, image_size)).shape == (2, 1, patches, patches)


@pytest.mark.parametrize(("num_layers", "patch"), [(3, 70), (2, 34), (1, 16)])
def test_size_of_a_patch(num_layers, patch):
    net = PatchDiscriminator(base_channels=2, num_layers=num_layers).double().eval()
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    logits = net(image)
    middle = logits.shape[-1] // 2
    logits[0, 0, middle, middle].backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


@pytest.mark.parametrize(("num_layers", "minimum"), [(3, 24), (2, 12), (1, 6)])
@pytest.mark.parametrize("side", [0, 1])
def test_refuses_images_that_are_too_small(num_layers, minimum, side):
    net = PatchDiscriminator(base_channels=2, num_layers=num_layers)
    shape = [2, 3, 64, 64]
    shape[2 + side] = minimum - 1
    with pytest.raises(ValueError, match=f"too small.*at least {minimum}.*num_layers"):
        net(torch.zeros(shape))


def test_widths_double_up_to_eight_times():
    widths = [m.out_channels for m in PatchDiscriminator(base_channels=2, num_layers=5).main if hasattr(m, "stride")]
    assert widths == [2, 4, 8, 16, 16, 16, 1]


def test_initial_weights():
    for name, parameter in PatchDiscriminator(base_channels=64, num_layers=2).named_parameters():
        if parameter.dim() == 4:
            # At least 3072 draws: the standard deviation is known to 1.3 %, six of them.
            assert parameter.std().item() == pytest.approx(0.02, rel=0.08), name
    norms = [m for m in PatchDiscriminator().modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all((norm.bias == 0).all() for norm in norms)
    assert torch.cat([norm.weight for norm in norms]).mean().item() == pytest.approx(1, abs=0.005)


@pytest.mark.parametrize("wrong", [{"num_layers": 0}, {"base_channels": 0}])
def test_refuses_settings_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is 0"):
        PatchDiscriminator(**wrong)
