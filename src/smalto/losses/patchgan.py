"""PatchGAN discriminator (arXiv:1611.07004): judges overlapping patches, not whole images."""

from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.global_batch import GlobalBatchNorm2d


class PatchDiscriminator(nn.Module):
    """Strided 4x4 convolutions with batch normalisation.

    Args:
        base_channels: width of the first layer; doubles per layer up to 8 times.
        num_layers: strided layers; 3 gives the paper's 70-px patches, 2 gives 34, 1 gives 16.
        global_statistics: normalise by the batch of all processes, so that their number does not matter. False: each
            by its own, as the authors (16 images on each of 8 GPUs).
    """

    def __init__(self, *, base_channels: int = 64, num_layers: int = 3, global_statistics: bool = True) -> None:
        super().__init__()
        if num_layers < 1 or base_channels < 1:
            raise InputError(
                f"discriminator: num_layers is {num_layers}, base_channels is {base_channels}, both must be >= 1"
            )
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                (GlobalBatchNorm2d if global_statistics else nn.BatchNorm2d)(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.min_image_size = 3 * 2**num_layers
        """Below this the last two convolutions have nothing left to look at."""
        self.main = nn.Sequential(*layers)
        self.init_weights()

    def init_weights(self) -> None:
        """Convolutions N(0, 0.02), normalisation scales N(1, 0.02), as pix2pix."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [-1, 1] to patch logits (B, 1, h, w), high where it looks real."""
        if min(image.shape[-2:]) < self.min_image_size:
            raise InputError(
                f"image of {tuple(image.shape[-2:])} px is too small for this discriminator (at least "
                f"{self.min_image_size}); lower task.discriminator.num_layers"
            )
        return self.main(image)
