"""The VQGAN of LlamaGen (section 2.1): convolutional encoder and decoder around a vector quantizer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.conv import Downsample, Normalize, ResnetBlock, SpatialAttention, Upsample, silu
from smalto.nn.layout import LaidOut
from smalto.tokenizers.quantize import QuantizerOutput, VectorQuantizer
from smalto.types import CodeShape


@dataclass(frozen=True)
class ConvStack:
    """Widths and depths shared by encoder and decoder.

    Args:
        base_channels: width at full resolution before multipliers.
        channel_multipliers: one per level, from full to lowest resolution; each level but the last halves the plane.
        num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
        dropout: inside residual blocks.
        norm_groups: groups of every normalisation.
    """

    base_channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    dropout: float
    norm_groups: int

    @property
    def widths(self) -> list[int]:
        """Channels per level, from full to lowest resolution."""
        return [self.base_channels * m for m in self.channel_multipliers]

    def res(self, in_channels: int, out_channels: int) -> ResnetBlock:
        """A residual block in this style."""
        return ResnetBlock(in_channels, out_channels, dropout=self.dropout, norm_groups=self.norm_groups)

    def attention(self, channels: int) -> SpatialAttention:
        """An attention block in this style."""
        return SpatialAttention(channels, norm_groups=self.norm_groups)

    def middle(self, channels: int) -> nn.Sequential:
        """Residual, attention, residual at the lowest resolution."""
        return nn.Sequential(self.res(channels, channels), self.attention(channels), self.res(channels, channels))


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention at the lowest, then the change of resolution."""

    def __init__(
        self,
        stack: ConvStack,
        in_channels: int,
        out_channels: int,
        *,
        num_blocks: int,
        attention: bool,
        resample: nn.Module | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_blocks
        self.res = nn.ModuleList(stack.res(widths[i], widths[i + 1]) for i in range(num_blocks))
        self.attention = nn.ModuleList(stack.attention(out_channels) for _ in range(num_blocks if attention else 0))
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attention):
                x = self.attention[i](x)
        return self.resample(x)


class Encoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] to (B, z_channels, h, w)."""

    def __init__(self, stack: ConvStack, *, z_channels: int) -> None:
        super().__init__()
        widths = stack.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, stack.base_channels, 3, padding=1)
        self.levels = nn.ModuleList(
            Level(
                stack,
                widths[max(i - 1, 0)] if i else stack.base_channels,
                width,
                num_blocks=stack.num_res_blocks,
                attention=i == last,
                resample=Downsample(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.middle = stack.middle(widths[-1])
        self.norm_out = Normalize(widths[-1], groups=stack.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """(B, z_channels, h, w) to (B, 3, H, W); levels are stored in execution order, lowest resolution first."""

    def __init__(self, stack: ConvStack, *, z_channels: int) -> None:
        super().__init__()
        widths = stack.widths[::-1]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.middle = stack.middle(widths[0])
        self.levels = nn.ModuleList(
            Level(
                stack,
                widths[max(i - 1, 0)],
                width,
                num_blocks=stack.num_res_blocks + 1,
                attention=i == 0,
                resample=Upsample(width) if i < last else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = Normalize(widths[-1], groups=stack.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(silu(self.norm_out(x)))


class VQModel(LaidOut):
    """Image tokenizer: one code per ``downsample_factor`` x ``downsample_factor`` patch, raster order.

    Args:
        image_size: side of the square images; sets ``code_shape`` only, the weights fit any multiple of the factor.
        base_channels: 128 in the paper.
        channel_multipliers: (1, 1, 2, 2, 4) gives stride 16, (1, 2, 2, 4) stride 8.
        quantizer: makes the :class:`VectorQuantizer`.
        z_channels: width between encoder and quantizer projection; 256 in the paper.
        num_res_blocks: per encoder level; 2 in the paper.
        dropout: inside residual blocks; 0 in the paper.
        norm_groups: 32 in the paper; small models need fewer.
    """

    def __init__(
        self,
        *,
        image_size: int,
        base_channels: int,
        channel_multipliers: Sequence[int],
        quantizer: Callable[[], VectorQuantizer],
        z_channels: int = 256,
        num_res_blocks: int = 2,
        dropout: float = 0.0,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        factor = 2 ** (len(channel_multipliers) - 1)
        if image_size % factor or image_size < factor:
            raise InputError(
                f"image_size is {image_size}; a tokenizer of stride {factor} needs a multiple of {factor}, "
                f"for instance {max(1, image_size // factor) * factor}"
            )
        stack = ConvStack(base_channels, tuple(channel_multipliers), num_res_blocks, dropout, norm_groups)
        self.image_size = image_size
        self.downsample_factor = factor
        self.code_shape: CodeShape = ((image_size // factor, image_size // factor),)
        self.encoder = Encoder(stack, z_channels=z_channels)
        self.quantizer = quantizer()
        self.codebook_size: int = self.quantizer.codebook_size
        self.quant_conv = nn.Conv2d(z_channels, self.quantizer.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.quantizer.codebook_dim, z_channels, 1)
        self.decoder = Decoder(stack, z_channels=z_channels)
        self._run_in_training: Callable[[nn.Module, Tensor], Tensor] = _run

    def compile_stacks(self) -> None:
        """Compile encoder and decoder for training, one graph each.

        Not block by block: blocks of a dozen shapes share their code, more than torch keeps compiled variants of one
        function, and it would go on with the rest uncompiled. Within a wrap of DDP torch divides the graphs where
        gradients are due. Evaluation stays eager, so the sizes of its batches compile nothing.
        """
        self._run_in_training = torch.compile(_run, dynamic=False, fullgraph=True)

    def _stack(self, stack: nn.Module, x: Tensor) -> Tensor:
        return (self._run_in_training if self.training and torch.is_grad_enabled() else _run)(stack, x)

    @property
    def last_layer(self) -> Tensor:
        """Where the adaptive adversarial weight compares gradients."""
        return self.decoder.conv_out.weight

    def quantize(self, image: Tensor) -> QuantizerOutput:
        """Float (B, 3, H, W) in [-1, 1] to codes and quantised latents; H and W must be multiples of the stride."""
        if image.shape[-2] % self.downsample_factor or image.shape[-1] % self.downsample_factor:
            raise InputError(
                f"images of {tuple(image.shape[-2:])} px cannot be tokenized with stride {self.downsample_factor}; "
                "both sides must be multiples of it: crop or resize them (image_size=)"
            )
        return self.quantizer(self.quant_conv(self._stack(self.encoder, image)))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """(B, codebook_dim, h, w) to float (B, 3, H, W), about [-1, 1], not clamped."""
        return self._stack(self.decoder, self.post_quant_conv(latent))

    def forward(self, image: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """Reconstruct float (B, 3, H, W) in [-1, 1]."""
        quantized = self.quantize(image)
        return self.decode_latent(quantized.latent), quantized

    def encode(self, image: Tensor) -> Tensor:
        """Float (B, 3, H, W) in [-1, 1] to int64 codes (B, L)."""
        return self.quantize(image).codes

    def decode(self, codes: Tensor) -> Tensor:
        """Int64 (B, L) with L = the product of ``code_shape`` to float (B, 3, H, W)."""
        rows, columns = self.code_shape[0]
        if codes.shape[1] != math.prod((rows, columns)):
            raise InputError(
                f"{codes.shape[1]} codes per image were given, a {self.image_size}-px tokenizer of stride "
                f"{self.downsample_factor} decodes {rows} x {columns} = {rows * columns}; set image_size to match"
            )
        latent = self.quantizer.lookup(codes).view(codes.shape[0], rows, columns, -1).movedim(-1, 1)
        return self.decode_latent(latent.to(self.post_quant_conv.weight.dtype))


def _run(stack: nn.Module, x: Tensor) -> Tensor:
    """A function, not a method: what is compiled is no module, so none changes its name."""
    return stack(x)
