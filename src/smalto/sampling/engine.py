"""A GPT laid out for decoding: the same logits as ``GPT.prefill`` and ``GPT.step``, a few times sooner.

What makes the difference, in the order of what it brings on a CPU: weights packed once for few rows and in half
precision (:mod:`smalto.sampling.packed`); gate and up projection in one matrix; norm scales folded into the matrix
behind them; rotary pairs as one complex product; grouped queries attending as the rows of one query matrix, so that
keys and values are never repeated. ``models/gpt.py`` stays the readable statement of what is computed.

Legend: B batch, T positions, C width, H heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.errors import InputError
from smalto.models.conditioner import TextConditioner
from smalto.models.gpt import GPT
from smalto.nn.block import TransformerBlock
from smalto.nn.kv_cache import KVCache
from smalto.nn.norm import RMSNorm
from smalto.nn.whole import kept, one_by_one
from smalto.sampling.alike import gated, gelu, norm, turned
from smalto.sampling.autoregressive import NullCondition
from smalto.sampling.coverage import check_logits, check_structure
from smalto.sampling.packed import Linear, check_dtype, constant, packed_linear, resolve_dtype, uniform_rows
from smalto.tokenizers.precision import PRECISIONS


@dataclass(frozen=True)
class EngineConfig:
    """How decoding computes.

    Args:
        dtype: of the transformer: ``auto`` | ``fp32`` | ``bf16`` | ``fp16`` | ``int8``, see
            :func:`smalto.sampling.packed.resolve_dtype`.
        compile: compile the decode step, see :mod:`smalto.sampling.compiled`; not with ``fp16``. ``auto``: on CUDA
            devices that the compiler has code for.
        decode: of the tokenizer that turns codes into pictures: ``fp32`` | ``bf16`` | ``auto``, see
            :mod:`smalto.tokenizers.precision`; other than ``fp32`` it moves pixels, and with them metrics.

    Raises:
        ValueError: another word.
    """

    dtype: str = "auto"
    decode: str = "fp32"
    compile: bool | str = "auto"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)  # whether a device has fp16 is known only with the device
        if self.compile not in (True, False, "auto"):
            raise InputError(f"engine.compile is {self.compile!r}, must be auto, true or false")
        if self.compile != "auto" and self.compile and self.dtype == "fp16":
            raise InputError(
                "engine.compile=true cannot see into the fp16 weights of engine.dtype=fp16; "
                "choose auto, fp32, bf16 or int8"
            )
        if self.decode not in PRECISIONS:
            raise InputError(f"engine.decode is {self.decode!r}, must be one of {', '.join(PRECISIONS)}")

    def compiles(self, device: torch.device) -> bool:
        """Whether the decode step is compiled on ``device``."""
        if self.compile == "auto":
            return device.type == "cuda" and _has_triton()
        return bool(self.compile)

    def computes_in(self, device: torch.device) -> str:
        """The dtype the transformer really computes in on ``device``, never ``auto``; for records and comparisons.

        Raises:
            ValueError: ``fp16`` where there is no kernel for it, ``int8`` on CUDA without compiling.
        """
        compiles = self.compiles(device)
        if self.dtype == "int8" and device.type == "cuda" and not compiles:
            raise InputError(
                "engine.dtype=int8 without compiling would write all weights out as bf16 in every step on CUDA, which "
                "takes longer than bf16; choose engine.dtype=bf16, or engine.compile=true where Triton is installed"
            )
        return resolve_dtype(self.dtype, device, packed=not compiles)


def _has_triton() -> bool:
    """Whether the compiler can make kernels: Triton is installed and knows the device (from Volta on)."""
    from torch.utils._triton import has_triton

    return has_triton()


class _Layer:
    """The packed weights of one block."""

    def __init__(self, block: TransformerBlock, *, dtype: str, rows: int | None) -> None:
        attention, ffn = block.attention, block.ffn
        num_queries = attention.num_heads * attention.head_dim
        queries, others = attention.qkv.weight.detach().float().tensor_split([num_queries])
        queries = queries * attention.head_dim**-0.5  # the scale of attention scores
        self.qkv = _fold(block.attention_norm, [queries, others], dtype=dtype, rows=rows)
        self.proj = packed_linear(kept(attention.proj.weight, block), dtype=dtype, rows=rows)
        self.gate_up = _fold(block.ffn_norm, [ffn.gate.weight, ffn.up.weight], dtype=dtype, rows=rows)
        self.down = packed_linear(kept(ffn.down.weight, block), dtype=dtype, rows=rows)
        self.attention_floor, self.ffn_floor = _norm_floor(block.attention_norm), _norm_floor(block.ffn_norm)


def _fold(norm: RMSNorm, weights: list[Tensor], *, dtype: str, rows: int | None) -> Linear:
    """One matrix of several that read the same normalised input, with the norm's factors in its columns."""
    stacked = torch.cat([weight.detach().float() for weight in weights])
    return packed_linear(stacked * (norm.weight.detach().float() * stacked.shape[1] ** 0.5), dtype=dtype, rows=rows)


def _norm_floor(norm: RMSNorm) -> Tensor:
    """sqrt(C eps): ``x / sqrt(mean(x^2) + eps)`` is ``sqrt(C) x / hypot(|x|, sqrt(C eps))``, in fewer operations."""
    return constant(norm.weight.new_tensor(norm.weight.numel() * norm.eps, dtype=torch.float32).sqrt())


class DecodeEngine:
    """A model with its weights packed for decoding; build another one when the weights have changed.

    Takes the model's place in :func:`smalto.sampling.autoregressive.generate`. The residual stream and the logits
    are float32 in every dtype.

    With ``fp32``, ``fp16`` and ``int8`` on an x86 CPU every operation treats rows alike, so that the codes of an image
    are the same bit for bit whatever images it is drawn with, on one machine with one number of threads: elementwise
    functions by construction (:mod:`smalto.sampling.alike`), matrix kernels as measured with AVX2 and AVX-512 for 1 to
    64 threads. With ``bf16``, and on other devices, kernels may round differently for other numbers of rows; a code
    then changes when a uniform falls between the two roundings.

    Args:
        model: on the device to decode on; its conditioner and embedding are used as they are.
        dtype: see :class:`EngineConfig`.
        rows: number of rows of a step the layout is chosen for, twice the images under guidance; None: weights in
            torch's own layout, for a compiler, without fp16.

    Raises:
        ValueError: a model that computes what the engine does not, see :mod:`smalto.sampling.coverage`.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, *, dtype: str = "auto", rows: int | None) -> None:
        check_structure(model)
        self.model = model
        self.num_codes = model.num_codes
        self.conditioner: NullCondition = model.conditioner
        weight = model.token_embedding.weight
        self.dtype = resolve_dtype(dtype, weight.device, packed=rows is not None)
        in_bf16 = self.dtype == "bf16" or (self.dtype == "int8" and weight.device.type == "cuda")
        self.compute = torch.bfloat16 if in_bf16 else torch.float32
        blocks: Any = model.blocks
        self.layers = [_Layer(block, dtype=self.dtype, rows=rows) for block in one_by_one(blocks)]
        self.output = _fold(model.norm, [model.output.weight], dtype=self.dtype, rows=rows)
        self.floor = _norm_floor(model.norm)
        self.rope = torch.view_as_complex(model.rope.float().contiguous()).unsqueeze(1)
        self.head_dim, self.num_kv_heads = model.head_dim, model.num_kv_heads
        self.num_heads = model.dim // model.head_dim
        check_logits(model, self)

    @property
    def held_bytes(self) -> int:
        """Memory of a cache that is kept for the next batch: none."""
        return 0

    def new_cache(self, batch_size: int) -> KVCache:
        """A cache for one image per row."""
        return KVCache(
            num_layers=len(self.layers),
            batch_size=batch_size,
            num_kv_heads=self.num_kv_heads,
            max_length=self.model.conditioner.num_tokens + self.num_codes - 1,
            head_dim=self.head_dim,
            dtype=self.compute,
            device=self.rope.device,
        )

    def prefill(self, condition: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        """As :meth:`smalto.models.gpt.GPT.prefill`."""
        prefix = self._embed(condition)
        mask = None
        if condition_mask is not None:
            cache.prefix_mask = condition_mask
            mask = GPT._causal_mask(condition_mask, prefix.shape[1])
        return self._decode(prefix, cache, mask)

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """As :meth:`smalto.models.gpt.GPT.step`."""
        mask = None
        if cache.prefix_mask is not None:
            mask = F.pad(cache.prefix_mask, (0, cache.length + 1 - cache.prefix_mask.shape[1]), value=True)
            mask = mask[:, None, None, :]
        return self._decode(self.model.token_embedding(codes).float().unsqueeze(1), cache, mask)

    def _embed(self, condition: Tensor) -> Tensor:
        """The conditioner's float32 (B, P, C); the matrices of text are packed, to round alike for all rows."""
        conditioner = self.model.conditioner
        if not isinstance(conditioner, TextConditioner):
            return conditioner(condition).float()
        fc1, fc2 = (packed_linear(fc.weight, dtype="fp32", rows=1) for fc in (conditioner.fc1, conditioner.fc2))
        return fc2(gelu(fc1(condition.float())))

    def _decode(self, x_BTC: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        batch, length, dim = x_BTC.shape
        rows = batch * length
        x = self._pad(x_BTC.reshape(rows, dim))
        rope = self.rope[cache.length : cache.length + length]
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normalise(x, layer.attention_floor))[:rows]
            attended = self._attend(qkv.view(batch, length, -1, self.head_dim), rope, cache, i, mask)
            x = x + layer.proj(self._pad(attended.view(rows, dim)))
            x += layer.down(gated(layer.gate_up(self._normalise(x, layer.ffn_floor))))
        cache.advance(length)
        if length > 1:
            x = self._pad(x[:rows].view(batch, length, dim)[:, -1])
        return self.output(self._normalise(x, self.floor))[:batch].float()

    def _pad(self, x: Tensor) -> Tensor:
        """Rows for the matrix kernels; those beyond the real ones are zero and their results unused."""
        more = uniform_rows(x.shape[0], self.dtype) - x.shape[0]
        return F.pad(x, (0, 0, 0, more)) if more else x

    def _normalise(self, x: Tensor, floor: Tensor) -> Tensor:
        """Root mean square 1 / sqrt(C); what is left of the norm is in the next matrix."""
        normed = x / norm(x, floor)
        return normed if self.compute == torch.float32 else normed.to(self.compute)

    def _attend(self, qkv: Tensor, rope: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
        """(B, T, H + 2 KV, D) to (B, T, H D): turn, append to the cache, attend."""
        turning = self.num_heads + self.num_kv_heads
        qk = turned(qkv[:, :, :turning], rope).to(self.compute)
        q, k = qk[:, :, : self.num_heads].transpose(1, 2), qk[:, :, self.num_heads :].transpose(1, 2)
        k, v = cache.update(layer, k, qkv[:, :, turning:].transpose(1, 2))
        batch, _, length, _ = q.shape
        if q.device.type == "cpu" and self.compute == torch.float32:
            out = _attention(q, k, v, mask)
        else:
            causal, grouped = mask is None and q.shape[2] > 1, self.num_kv_heads != self.num_heads
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=1.0, enable_gqa=grouped
            )
        return out.transpose(1, 2).reshape(batch, length, -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention (B, H, T, D) without scale, causal without a mask; queries of a group are rows of one matrix.

    As fast as the fused CPU kernel at these sizes. The results of that one for a row depend on the thread it falls to.
    """
    batch, num_heads, length, size = q.shape
    if mask is None and length > 1:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=q.device).tril()
    scores = q.reshape(batch, k.shape[1], -1, size) @ k.transpose(2, 3)
    if mask is not None:
        scores.view(batch, num_heads, length, -1).masked_fill_(~mask, -torch.inf)
    return (scores.softmax(dim=-1) @ v).view(batch, num_heads, length, size)
