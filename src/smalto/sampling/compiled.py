"""The decode step as compiled graphs of fixed shapes, for devices on which starting kernels is what takes the time.

A graph reads the codes before, appends to the cache, guides, draws and writes the next codes: one call per code, and
no result that the next call could overwrite. On a GPU graphs are recorded and replayed (CUDA graphs). Each replay
copies the inputs that may lie elsewhere than before, so there is but one, the position: weights are constants, and
caches and codes lie in buffers that the engine keeps from batch to batch.

On a CPU it is right but hardly a gain: a compiler cannot see into packed weights.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.models.gpt import GPT
from smalto.nn.kv_cache import KVCache
from smalto.nn.rope import apply_rope
from smalto.sampling.autoregressive import Draft, guided_logits
from smalto.sampling.engine import DecodeEngine
from smalto.sampling.logits import MIN_TEMPERATURE, next_codes
from smalto.sampling.packed import constant
from smalto.types import SamplingConfig

_LENGTHS = 4
"""Graphs of a batch: each reads the front of the cache up to another length, on average 5/8 of it instead of all."""
_LENGTH_MULTIPLE = 64
_LIMITS = {"recompile_limit": 100_000, "accumulated_recompile_limit": 100_000, "fail_on_recompile_limit_hit": True}
"""The compiler's own limits are 8, behind which it computes without compiling and says so in the log only."""


class CompiledEngine(DecodeEngine):
    """A :class:`DecodeEngine` that draws in its step, see :class:`smalto.sampling.autoregressive.WritesDrafts`.

    The prefill is not compiled. There is a graph for each number of rows, length of the cache that is read, and kind of
    draw (``top_k``, ``top_p``, whether ``temperature`` is 0). It is compiled when it is first needed, in seconds to a
    minute, and serves later engines of the same model, too.

    There is one cache and one draft at a time: the next ones take their memory.

    Args:
        model: as in :class:`DecodeEngine`.
        dtype: ``auto``, ``fp32``, ``bf16`` or ``int8``; ``auto`` is fp32 where it would be fp16.
    """

    def __init__(self, model: GPT, *, dtype: str = "auto") -> None:
        self._buffers: dict[str, Tensor] = {}
        super().__init__(model, dtype=dtype, rows=None)
        device = self.rope.device
        self.embedding = constant(model.token_embedding.weight.detach())
        self.table = constant(torch.view_as_real(self.rope.squeeze(1)))
        self.grouped = self.num_kv_heads != self.num_heads
        self.prefix = model.conditioner.num_tokens
        self.scale, self.temperature = constant(torch.ones((), device=device)), constant(torch.ones((), device=device))
        self._filters = SamplingConfig()
        self._places = torch.arange(self.num_codes, device=device)
        self._seen: set[tuple[Any, ...]] = set()
        mode = None
        if device.type == "cuda":  # int8 pays only where kernels that widen weights as they read them are tried
            mode = "max-autotune" if self.dtype == "int8" else "reduce-overhead"
        # A function, not a method: what the compiler keeps must not keep the engine and its weights.
        self._compiled = torch.compile(_write, mode=mode, dynamic=False, fullgraph=True)

    @property
    def held_bytes(self) -> int:
        """Memory of the cache and the draft, which the next batch uses again."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def new_cache(self, batch_size: int) -> KVCache:
        """A cache of zeros: positions not written yet are read, with weight zero."""
        cache = super().new_cache(0)
        for name, tensors in (("keys", cache.keys), ("values", cache.values)):
            for i, like in enumerate(tensors):
                tensors[i] = self._buffer(f"{name} {i}", (batch_size, *like.shape[1:]), like.dtype).zero_()
        return cache

    def prefill(self, condition: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        """As :meth:`smalto.models.gpt.GPT.prefill`."""
        if condition_mask is not None:
            condition_mask = self._buffer("mask", condition_mask.shape, torch.bool).copy_(condition_mask)
        return super().prefill(condition, cache, condition_mask)

    def new_draft(self, uniforms: Tensor, sampling: SamplingConfig) -> Draft:
        """An empty draft, which takes the memory of the one before."""
        draft = Draft(uniforms, sampling)
        draft.uniforms = self._buffer("uniforms", uniforms.shape, torch.float32).copy_(uniforms)
        draft.codes = self._buffer("codes", uniforms.shape, torch.int64).zero_()
        draft.sums = self._buffer("sums", uniforms.shape, torch.float32).zero_()
        # Tensors in the graph, so that a sweep over them compiles nothing.
        self.scale.fill_(sampling.cfg_scale)
        self.temperature.fill_(min(max(sampling.temperature, MIN_TEMPERATURE), torch.finfo(torch.float32).max))
        self._filters = replace(sampling, cfg_scale=1.0, cfg_interval=-1, temperature=float(sampling.temperature > 0))
        return draft

    def write(self, draft: Draft, i: int, cache: KVCache) -> None:
        """Append code ``i - 1`` to the cache and write code ``i``."""
        cache.check(1)
        for buffer in (*cache.keys, *cache.values):  # views of fewer rows do not know it
            torch._dynamo.mark_static_address(buffer)
        if cache.prefix_mask is not None:
            torch._dynamo.mark_static_address(cache.prefix_mask)
        length = _read_length(cache.length + 1, cache.max_length)
        graph = (len(cache.keys[0]), len(draft.codes), length, cache.prefix_mask is None, self._filters)
        with nullcontext() if graph in self._seen else torch._dynamo.config.patch(_LIMITS):
            torch.compiler.cudagraph_mark_step_begin()
            self._compiled(
                self, draft.codes, draft.sums, draft.uniforms, self._places[i : i + 1],
                cache.keys, cache.values, cache.prefix_mask, length, self._filters,
            )  # fmt: skip
        self._seen.add(graph)
        cache.advance(1)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The first rows of a buffer that stays where it is until more rows are asked for."""
        if name not in self._buffers or len(self._buffers[name]) < shape[0]:
            self._buffers.pop(name, None)  # the memory first
            with torch.inference_mode(False):
                self._buffers[name] = torch.empty(shape, dtype=dtype, device=self.rope.device)
        rows = self._buffers[name][: shape[0]]
        torch._dynamo.mark_static_address(rows)
        return rows


def _read_length(filled: int, max_length: int) -> int:
    """The least of a few lengths of the cache that ``filled`` positions fit in."""
    part = -(-max_length // (_LENGTHS * _LENGTH_MULTIPLE)) * _LENGTH_MULTIPLE
    return min(-(-filled // part) * part, max_length)


def _write(
    engine: CompiledEngine,
    codes: Tensor,
    sums: Tensor,
    uniforms: Tensor,
    at: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    prefix_mask: Tensor | None,
    length: int,
    filters: SamplingConfig,
) -> None:
    """Draw code ``at`` (1,) of codes (B, L) from the code before and the first ``length`` positions of the cache."""
    last = codes.index_select(1, at - 1).squeeze(1)
    guided = len(keys[0]) > len(codes)
    logits = _logits(
        engine, torch.cat([last, last]) if guided else last, at + (engine.prefix - 1), keys, values, prefix_mask, length
    )
    if guided:
        logits = guided_logits(logits, engine.scale)
    sums.index_copy_(1, at, logits.sum(-1, keepdim=True))
    drawn = next_codes(logits / engine.temperature, uniforms.index_select(1, at).squeeze(1), filters)
    codes.index_copy_(1, at, drawn.unsqueeze(1))


def _logits(
    engine: CompiledEngine,
    codes: Tensor,
    at: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    prefix_mask: Tensor | None,
    length: int,
) -> Tensor:
    """Logits (R, V) behind codes (R,) at position ``at`` (1,), appended to keys and values, each (R, KV, S, D)."""
    visible = (torch.arange(length, device=at.device) <= at).view(1, 1, 1, length)
    if prefix_mask is not None:
        shown = F.pad(prefix_mask, (0, length - prefix_mask.shape[1]), value=True)
        visible = visible & shown[:, None, None, :]
    turn = engine.table.index_select(0, at)
    x = F.embedding(codes, engine.embedding).float()
    for layer, k_cache, v_cache in zip(engine.layers, keys, values, strict=True):
        qkv = layer.qkv(engine._normalise(x, layer.attention_floor)).view(len(codes), 1, -1, engine.head_dim)
        q, k, v = qkv.split([engine.num_heads, engine.num_kv_heads, engine.num_kv_heads], dim=2)
        k_cache.index_copy_(2, at, apply_rope(k, turn).transpose(1, 2))
        v_cache.index_copy_(2, at, v.transpose(1, 2))
        attended = F.scaled_dot_product_attention(
            apply_rope(q, turn).transpose(1, 2),
            k_cache[:, :, :length],
            v_cache[:, :, :length],
            attn_mask=visible,
            scale=1.0,
            enable_gqa=engine.grouped,
        )
        x = x + layer.proj(attended.transpose(1, 2).reshape(len(codes), -1))
        gate, up = layer.gate_up(engine._normalise(x, layer.ffn_floor)).chunk(2, dim=-1)
        x = x + layer.down(F.silu(gate) * up)
    return engine.output(engine._normalise(x, engine.floor)).float()
