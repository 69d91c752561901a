"""Samplers to compare, each as "one whole iteration at this position": logits, guidance, filters, draw.

An iteration at a given position costs the same in a short run as in a long one, so that a few positions spread over
the image stand for all of them and many rounds fit into minutes.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rows import peer_module
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from smalto.nn.rope import apply_rope
from smalto.sampling.autoregressive import generate
from smalto.sampling.engine import DecodeEngine
from smalto.sampling.logits import next_codes
from smalto.types import SamplingConfig

Step = Callable[[int], Any]
CLASSES, CODES, GRID = 1000, 16384, (16, 16)
SIZES = {"B": {"dim": 768, "num_layers": 12, "num_heads": 12}, "small": {"dim": 384, "num_layers": 6, "num_heads": 6}}
SAMPLING = SamplingConfig(cfg_scale=4.0)


def make_model(size: str) -> GPT:
    """A model with weights of order 1 signals; the fresh output layer is zero, all its codes equally likely."""
    torch.manual_seed(0)
    conditioner = partial(ClassConditioner, num_classes=CLASSES, drop_prob=0.1)
    net = GPT(vocab_size=CODES, code_shape=(GRID,), conditioner=conditioner, **SIZES[size]).eval()
    torch.nn.init.normal_(net.output.weight, std=0.02)
    return net


def smalto_step(net: Any, images: int) -> Step:
    """The body of ``generate``'s loop over a model or an engine; before position 0 comes the prefill."""
    cache = net.new_cache(2 * images)
    net.prefill(torch.cat([torch.arange(images), net.conditioner.null(images)]), cache)
    for buffer in cache.keys + cache.values:
        buffer.zero_()
    codes, uniforms = torch.arange(images), torch.rand(images)

    def step(position: int) -> Tensor:
        cache.length = 1 + position
        cond, uncond = net.step(torch.cat([codes] * 2), cache).chunk(2)
        return next_codes((cond - uncond) * SAMPLING.cfg_scale + uncond, uniforms, SAMPLING)

    return step


class PlainSampler:
    """An ordinary eager sampler in float32: the cache attended to in full behind a mask, sorted filters."""

    def __init__(self, net: GPT, images: int) -> None:
        rows, length = 2 * images, 1 + net.num_codes
        self.net, self.heads, self.size, self.length = net, net.dim // net.head_dim, net.head_dim, length
        self.keys = [torch.zeros(rows, self.heads, length, self.size) for _ in net.blocks]
        self.values = [torch.zeros(rows, self.heads, length, self.size) for _ in net.blocks]

    def draw(self, x: Tensor, at: int) -> Tensor:
        """Codes (B, 1) that follow the inputs (2B, 1, C) at place ``at``."""
        net, rows = self.net, len(x)
        mask = (torch.arange(self.length) <= at).view(1, 1, 1, self.length)
        rope = net.rope[at : at + 1]
        for block, all_k, all_v in zip(net.blocks, self.keys, self.values, strict=True):
            attention, ffn, normed = block.attention, block.ffn, block.attention_norm(x)
            q, k, v = attention.qkv(normed).view(rows, 1, 3 * self.heads, self.size).chunk(3, dim=2)
            q, k = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2)
            all_k[:, :, at], all_v[:, :, at] = k[:, :, 0], v[:, 0]
            out = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=mask)
            x = x + attention.proj(out.transpose(1, 2).reshape(rows, 1, net.dim))
            x = x + ffn(block.ffn_norm(x))
        cond, uncond = net.output(net.norm(x[:, -1])).chunk(2)
        ordered, index = (uncond + SAMPLING.cfg_scale * (cond - uncond)).sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities > SAMPLING.top_p] = 0
        return index.gather(-1, torch.multinomial(probabilities, 1))

    def follow(self, codes: Tensor, at: int) -> Tensor:
        """Codes that follow ``codes`` (B,) at place ``at``."""
        return self.draw(self.net.token_embedding(torch.cat([codes, codes])).unsqueeze(1), at)


def plain_step(net: GPT, images: int) -> Step:
    """One iteration of the plain sampler; its cache is empty elsewhere."""
    sampler, codes = PlainSampler(net, images), torch.arange(images)
    return lambda position: sampler.follow(codes, position + 1)


def plain_call(net: GPT, images: int) -> Step:
    """Whole images by the plain sampler, codes (B, L)."""
    labels = torch.arange(images)

    def call(_: int) -> Tensor:
        sampler = PlainSampler(net, images)
        condition = net.conditioner(torch.cat([labels, net.conditioner.null(images)]))
        codes = [sampler.draw(condition, 0)]
        for at in range(1, net.num_codes):
            codes.append(sampler.follow(codes[-1].squeeze(1), at))
        return torch.cat(codes, dim=1)

    return call


def smalto_call(net: GPT, images: int, dtype: str) -> Step:
    """Whole images as ``GPTTask.sample_codes`` writes them, packing the weights included."""
    labels, uniforms = torch.arange(images), torch.rand(images, net.num_codes)

    def call(_: int) -> Tensor:
        engine = DecodeEngine(net, dtype=dtype, rows=2 * images)
        return generate(engine, labels, sampling=SAMPLING, uniforms=uniforms)

    return call


def peer_model(path: str, size: str, dtype: torch.dtype) -> Any:
    """The authors' model from a checkout of FoundationVision/LlamaGen at ``path``."""
    models = peer_module(path, "autoregressive.models.gpt")
    shape = SIZES[size]
    args = models.ModelArgs(
        dim=shape["dim"], n_layer=shape["num_layers"], n_head=shape["num_heads"], vocab_size=CODES, block_size=256,
        num_classes=CLASSES, cls_token_num=1, model_type="c2i",
    )  # fmt: skip
    torch.manual_seed(0)
    net = models.Transformer(args).to(dtype).eval()
    torch.nn.init.normal_(net.output.weight, std=0.02)
    return net


PEER_SETTINGS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": True}


def peer_call(path: str, size: str, images: int, dtype: torch.dtype) -> Step:
    """Whole images by the authors' own function."""
    net, loop = peer_model(path, size, dtype), peer_module(path, "autoregressive.models.generate")

    def call(_: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop.generate(net, torch.arange(images), 256, cfg_scale=SAMPLING.cfg_scale, **PEER_SETTINGS)

    return call


def peer_step(path: str, size: str, images: int, dtype: torch.dtype) -> Step:
    """The authors' own loop body."""
    net, loop = peer_model(path, size, dtype), peer_module(path, "autoregressive.models.generate")
    net.setup_caches(max_batch_size=2 * images, max_seq_length=257, dtype=dtype)
    codes = torch.arange(images).view(-1, 1)

    def step(position: int) -> Any:
        at = torch.tensor([position + 1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop.decode_n_tokens(net, codes, at, 1, SAMPLING.cfg_scale, -1, **PEER_SETTINGS)

    return step


def engine_step(net: GPT, images: int, dtype: str) -> Step:
    """smalto's decode engine."""
    return smalto_step(DecodeEngine(net, dtype=dtype, rows=2 * images), images)
