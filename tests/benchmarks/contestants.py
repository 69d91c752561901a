"""Samplers to compare, each as "one whole iteration at this position": logits, guidance, filters, draw.

An iteration at a given position costs the same in a short run as in a long one, so that a few positions spread over
the image stand for all of them and many rounds fit into minutes.
"""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from smalto.nn.rope import apply_rope
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
    cache.keys.zero_()
    cache.values.zero_()
    codes, uniforms = torch.arange(images), torch.rand(images)

    def step(position: int) -> Tensor:
        cache.length = 1 + position
        cond, uncond = net.step(torch.cat([codes] * 2), cache).chunk(2)
        return next_codes(torch.lerp(uncond, cond, SAMPLING.cfg_scale), uniforms, SAMPLING)

    return step


def plain_step(net: GPT, images: int) -> Step:
    """An ordinary eager sampler in float32: the cache attended to in full behind a mask, sorted filters."""
    rows, length = 2 * images, 1 + net.num_codes
    heads, size = net.dim // net.head_dim, net.head_dim
    keys = [torch.zeros(rows, heads, length, size) for _ in net.blocks]
    values = [torch.zeros(rows, heads, length, size) for _ in net.blocks]
    codes = torch.arange(images)

    def step(position: int) -> Tensor:
        x = net.token_embedding(torch.cat([codes, codes])).unsqueeze(1)
        mask = (torch.arange(length) <= position + 1).view(1, 1, 1, length)
        rope = net.rope[position + 1 : position + 2]
        for block, all_k, all_v in zip(net.blocks, keys, values, strict=True):
            attention, ffn, normed = block.attention, block.ffn, block.attention_norm(x)
            q, k, v = attention.qkv(normed).view(rows, 1, 3 * heads, size).chunk(3, dim=2)
            q, k = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2)
            all_k[:, :, position + 1], all_v[:, :, position + 1] = k[:, :, 0], v[:, 0]
            out = F.scaled_dot_product_attention(q, all_k, all_v, attn_mask=mask)
            x = x + attention.proj(out.transpose(1, 2).reshape(rows, 1, net.dim))
            x = x + ffn(block.ffn_norm(x))
        cond, uncond = net.output(net.norm(x[:, -1])).chunk(2)
        ordered, index = (uncond + SAMPLING.cfg_scale * (cond - uncond)).sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        probabilities[probabilities.cumsum(-1) - probabilities > SAMPLING.top_p] = 0
        return index.gather(-1, torch.multinomial(probabilities, 1))

    return step


def peer_step(path: str, size: str, images: int, dtype: torch.dtype) -> Step:
    """The authors' own loop body from a checkout of FoundationVision/LlamaGen at ``path``."""
    if path not in sys.path:
        sys.path.insert(0, path)
    models = importlib.import_module("autoregressive.models.gpt")
    loop = importlib.import_module("autoregressive.models.generate")
    shape = SIZES[size]
    args = models.ModelArgs(
        dim=shape["dim"], n_layer=shape["num_layers"], n_head=shape["num_heads"], vocab_size=CODES, block_size=256,
        num_classes=CLASSES, cls_token_num=1, model_type="c2i",
    )  # fmt: skip
    torch.manual_seed(0)
    net = models.Transformer(args).to(dtype).eval()
    torch.nn.init.normal_(net.output.weight, std=0.02)
    net.setup_caches(max_batch_size=2 * images, max_seq_length=257, dtype=dtype)
    codes = torch.arange(images).view(-1, 1)

    def step(position: int) -> Any:
        at = torch.tensor([position + 1])
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "sample_logits": True}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loop.decode_n_tokens(net, codes, at, 1, SAMPLING.cfg_scale, -1, **settings)

    return step


def engine_step(net: GPT, images: int, dtype: str) -> Step:
    """smalto's decode engine."""
    return smalto_step(DecodeEngine(net, dtype=dtype, rows=2 * images), images)
