"""Does a batch fit? Asked before any work is done."""

from pathlib import Path

import torch

from smalto.errors import InputError
from smalto.models.gpt import GPT
from smalto.sampling.packed import BYTES_PER_WEIGHT

_BYTES_PER_LOGIT = 48
"""Logits of two rows, guided logits, probabilities, float64 sums, and sorted copies with indices when filtering."""


def bytes_per_image(model: GPT, *, guided: bool, itemsize: int) -> int:
    """What generation holds for one more image, at its peak: cache, logits, activations of the prefill."""
    rows = 2 if guided else 1
    length = model.conditioner.num_tokens + model.num_codes - 1
    cache = 2 * len(model.blocks) * model.num_kv_heads * length * model.head_dim * itemsize
    hidden: int = model.get_submodule("blocks.0.ffn.gate").out_features  # type: ignore[assignment]
    prefix, num_heads = model.conditioner.num_tokens, model.dim // model.head_dim
    activations = 4 * prefix * (8 * model.dim + 4 * hidden + 2 * num_heads * prefix)
    return rows * (cache + activations) + model.vocab_size * _BYTES_PER_LOGIT


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on ``device``; None where nobody knows."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def check_batch(model: GPT, images: int, *, guided: bool, dtype: str, packed: bool = False, held: int = 0) -> None:
    """Raise ValueError when ``images`` and a packed copy of the weights need more memory than is free.

    Args:
        model: on its device.
        images: asked for at once.
        guided: with an unconditional row per image.
        dtype: resolved, of the engine.
        packed: the copy of the weights is there already.
        held: bytes of an earlier batch that this one takes over.
    """
    device = model.token_embedding.weight.device
    free = free_bytes(device)
    if free is None:
        return
    free += held
    weights = sum(p.numel() for p in model.blocks.parameters()) + model.output.weight.numel()
    copy = 0 if packed else weights * BYTES_PER_WEIGHT[dtype]
    each = bytes_per_image(model, guided=guided, itemsize=2 if dtype == "bf16" else 4)
    if copy + images * each <= free:
        return
    fitting = max(0, (free - copy) // each)
    advice = f"the largest batch that fits is {fitting}" if fitting else "not even one image fits"
    raise InputError(
        f"a batch of {images} images needs about {(copy + images * each) / 1e9:.1f} GB "
        f"({each / 1e6:.0f} MB per image, {copy / 1e9:.1f} GB of packed weights), "
        f"{free / 1e9:.1f} GB are free on {device}; {advice} (batch_size=...)"
    )
