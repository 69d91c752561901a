"""Drawing images with a trained generator: memory and, at best, time."""

from dataclasses import dataclass

from smalto.analysis.scaling import GPTShape
from smalto.models.gpt import GPT
from smalto.planning.device import Device
from smalto.sampling.memory import bytes_per_image


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """Of one batch of images on one device.

    Args:
        guided: with an unconditional row per image.
        images: in the batch.
        flops_per_image: of the transformer.
        cache_bytes: keys and values of the batch when the last code is drawn.
        working_bytes: cache and activations of the transformer, or, if that is more, those of the tokenizer's decoder.
        packed_bytes: a copy of the weights, laid out for decoding.
        total_bytes: with the trained weights and the tokenizer.
        largest_batch: images that fit the device.
        seconds: of the batch, if every step took what reading weights and cache, or the arithmetic, takes at least.
    """

    guided: bool
    images: int
    flops_per_image: int
    cache_bytes: int
    working_bytes: int
    packed_bytes: int
    total_bytes: int
    largest_batch: int
    seconds: float


def plan_sampling(
    net: GPT, device: Device, *, images: int, guided: bool, usable: float, tokenizer_bytes: int, decoder_bytes: int
) -> SamplingPlan:
    """For a generator on the meta device, in bfloat16 where the device has it.

    Args:
        net: the generator.
        device: to draw on.
        images: in the batch.
        guided: see :class:`SamplingPlan`.
        usable: bytes of the device.
        tokenizer_bytes: weights of the tokenizer.
        decoder_bytes: activations of its decoder, see :func:`smalto.planning.step.decoding_bytes`.
    """
    itemsize = 2 if device.bf16 else 4  # as engine.dtype=auto; float16 weights under a cache in float32 are left out
    shape = GPTShape.of(net)
    rows = images * (2 if guided else 1)
    packed = itemsize * (shape.num_layers * shape.block_weights + shape.vocab_size * shape.dim)
    stored = sum(p.numel() * 4 for p in net.parameters()) + packed + tokenizer_bytes
    each = bytes_per_image(net, guided=guided, itemsize=itemsize)
    position = 2 * shape.num_layers * net.num_kv_heads * net.head_dim * itemsize
    flops = shape.sampling_flops(guided=guided)
    peak = 1e12 * (device.half_tflops if itemsize == 2 else device.fp32_tflops)
    read = packed + rows * position * (shape.prefix + shape.num_codes / 2)
    step = max(read / (device.bandwidth_gb_s * 1e9), images * flops / shape.num_codes / peak)
    working = max(images * each, decoder_bytes)
    return SamplingPlan(
        guided=guided,
        images=images,
        flops_per_image=flops,
        cache_bytes=rows * position * shape.positions,
        working_bytes=working,
        packed_bytes=packed,
        total_bytes=stored + working,
        largest_batch=max(0, int((usable - stored) // each)) if stored + decoder_bytes <= usable else 0,
        seconds=step * shape.num_codes,
    )
