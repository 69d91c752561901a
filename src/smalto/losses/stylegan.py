"""A discriminator like StyleGAN2's (arXiv:1912.04958), the other one that the LlamaGen authors offer.

It judges whole images, of one size. Minibatch statistics, equalised rates and gradient penalty are left out, as there.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.errors import InputError

WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
"""Channels by resolution."""


class Blur(nn.Module):
    """The outer product of [1, 2, 1] with itself, summing to 1, per channel; edges are mirrored."""

    f: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("f", torch.tensor([1.0, 2.0, 1.0]))  # in the authors' files too

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        channels = x.shape[1]
        kernel = torch.outer(self.f, self.f)
        kernel = (kernel / kernel.abs().sum()).to(x.dtype).expand(channels, 1, 3, 3)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), kernel, groups=channels)


class DownBlock(nn.Module):
    """Two convolutions, then blurred and halved; a 1x1 residual; their sum keeps its variance."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_res = nn.Conv2d(in_channels, out_channels, 1, stride=2)
        self.net = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.LeakyReLU(0.2),
        )
        self.downsample = nn.Sequential(Blur(), nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H / 2, W / 2)."""
        return (self.downsample(self.net(x)) + self.conv_res(x)) / math.sqrt(2)


class StyleGANDiscriminator(nn.Module):
    """One logit per image.

    Args:
        image_size: side of the images: 8, 16, ..., 1024. 36,500,225 parameters at 256.
    """

    def __init__(self, *, image_size: int) -> None:
        super().__init__()
        if image_size not in WIDTHS or image_size < 8:
            raise InputError(
                f"discriminator: image_size is {image_size}, a StyleGAN discriminator takes a power of two from 8 to "
                f"{max(WIDTHS)}; use discriminator=patchgan for other sizes"
            )
        self.image_size = image_size
        sides = [image_size // 2**i for i in range(int(math.log2(image_size)) - 1)]  # down to 4
        self.blocks = nn.Sequential(
            nn.Conv2d(3, WIDTHS[image_size], 3, padding=1),
            nn.LeakyReLU(0.2),
            *(DownBlock(WIDTHS[side], WIDTHS[side // 2]) for side in sides[:-1]),
        )
        top = WIDTHS[4]
        self.final_conv = nn.Sequential(nn.Conv2d(top, top, 3, padding=1), nn.LeakyReLU(0.2))
        self.final_linear = nn.Sequential(nn.Linear(top * 16, top), nn.LeakyReLU(0.2), nn.Linear(top, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Float (B, 3, S, S) in [-1, 1] to logits (B, 1), high where it looks real."""
        if image.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"image of {tuple(image.shape[-2:])} px for a discriminator of {self.image_size}; set "
                "task.discriminator.image_size, or use discriminator=patchgan, which takes any size"
            )
        return self.final_linear(self.final_conv(self.blocks(image)).flatten(1))
