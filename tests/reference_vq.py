"""The authors' tokenizer once more: functions of a dict of weights by their names, straight from its description."""

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def conv(w: Weights, name: str, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **options)


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """32 groups of channels, each to mean 0 and variance 1 over its channels and the plane."""
    batch, channels, height, width = x.shape
    groups = x.reshape(batch, 32, -1)
    mean = groups.mean(2, keepdim=True)
    variance = ((groups - mean) ** 2).mean(2, keepdim=True)
    flat = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(batch, channels, height, width)
    return flat * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def res_block(w: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(w, f"{name}.conv1", swish(norm(w, f"{name}.norm1", x)), padding=1)
    h = conv(w, f"{name}.conv2", swish(norm(w, f"{name}.norm2", h)), padding=1)
    return h + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def attention(w: Weights, name: str, x: Tensor) -> Tensor:
    h = norm(w, f"{name}.norm", x)
    q, k, v = (conv(w, f"{name}.{part}", h).flatten(2) for part in "qkv")
    p = torch.softmax(torch.einsum("bci,bcj->bij", q, k) * q.shape[1] ** -0.5, dim=2)
    return x + conv(w, f"{name}.proj_out", torch.einsum("bij,bcj->bci", p, v).reshape(x.shape))


def middle(w: Weights, name: str, x: Tensor) -> Tensor:
    x = attention(w, f"{name}.mid.1", res_block(w, f"{name}.mid.0", x))
    return res_block(w, f"{name}.mid.2", x)


def level(w: Weights, name: str, x: Tensor) -> Tensor:
    block = 0
    while f"{name}.res.{block}.conv1.weight" in w:
        x = res_block(w, f"{name}.res.{block}", x)
        if f"{name}.attn.{block}.q.weight" in w:
            x = attention(w, f"{name}.attn.{block}", x)
        block += 1
    return x


def levels(w: Weights, name: str) -> int:
    return len({key.split(".")[2] for key in w if key.startswith(f"{name}.conv_blocks.")})


def encode(w: Weights, image: Tensor) -> Tensor:
    """Latents (B, C, h, w) before quantization."""
    x = conv(w, "encoder.conv_in", image, padding=1)
    for i in range(levels(w, "encoder")):
        x = level(w, f"encoder.conv_blocks.{i}", x)
        if f"encoder.conv_blocks.{i}.downsample.conv.weight" in w:
            x = conv(w, f"encoder.conv_blocks.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    x = middle(w, "encoder", x)
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", swish(norm(w, "encoder.norm_out", x)), padding=1))


def decode(w: Weights, quantized: Tensor) -> Tensor:
    x = conv(w, "decoder.conv_in", conv(w, "post_quant_conv", quantized), padding=1)
    x = middle(w, "decoder", x)
    for i in range(levels(w, "decoder")):
        x = level(w, f"decoder.conv_blocks.{i}", x)
        if f"decoder.conv_blocks.{i}.upsample.conv.weight" in w:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(w, f"decoder.conv_blocks.{i}.upsample.conv", x, padding=1)
    return conv(w, "decoder.conv_out", swish(norm(w, "decoder.norm_out", x)), padding=1)


def unit(x: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def entropy_loss(d: Tensor) -> Tensor:
    """Of squared distances (N, K): affinities -d / 0.01, their entropy less that of their mean."""
    p = torch.softmax(-d / 0.01, dim=1)
    mean = p.mean(0)
    of_mean = -(mean * torch.log(mean + 1e-5)).sum()
    return -(p * torch.log_softmax(-d / 0.01 + 1e-5, dim=1)).sum(1).mean() - of_mean


def quantize(w: Weights, latent: Tensor, *, l2_norm: bool, entropy_weight: float) -> dict[str, Tensor]:
    """Codes, what the decoder sees, and the three losses of training."""
    z = latent.permute(0, 2, 3, 1)
    book = w["quantize.embedding.weight"]
    if l2_norm:
        z, book = unit(z), unit(book)
    rows = z.reshape(-1, z.shape[-1])
    d = (rows[:, None, :] - book[None, :, :]).pow(2).sum(2)  # all pairs, no expanded square
    codes = d.argmin(1)
    chosen = book[codes].reshape(z.shape)
    return {
        "codes": codes,
        "quantized": (z + (chosen - z).detach()).permute(0, 3, 1, 2),
        "codebook_loss": (chosen - z.detach()).pow(2).mean(),
        "commitment_loss": 0.25 * (chosen.detach() - z).pow(2).mean(),
        "entropy_loss": entropy_weight * entropy_loss(d),
    }
