"""The decode step as one compiled graph of fixed shapes, for devices on which starting kernels is what takes the time.

On a GPU the graph is recorded once per number of rows and replayed (CUDA graphs). On a CPU it is right but no gain:
a compiler cannot see into packed weights, and with fixed shapes a step attends to the whole cache behind a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.models.gpt import GPT
from smalto.nn.kv_cache import KVCache
from smalto.nn.rope import apply_rope
from smalto.sampling.engine import DecodeEngine


class CompiledEngine(DecodeEngine):
    """A :class:`DecodeEngine` whose step is compiled; the prefill is not.

    The first step of a number of rows compiles, which takes from seconds to a minute.

    Args:
        model: as in :class:`DecodeEngine`.
        dtype: ``auto``, ``fp32``, ``bf16`` or ``int8``; ``auto`` is fp32 where it would be fp16.
    """

    def __init__(self, model: GPT, *, dtype: str = "auto") -> None:
        super().__init__(model, dtype=dtype, rows=None)
        self.table = torch.view_as_real(self.rope.squeeze(1))
        self.grouped = self.num_kv_heads != self.num_heads
        on_gpu = self.table.device.type == "cuda"
        self._compiled = torch.compile(self._at, mode="reduce-overhead" if on_gpu else None)

    def new_cache(self, batch_size: int) -> KVCache:
        """A cache of zeros: positions not written yet are read, with weight zero."""
        cache = super().new_cache(batch_size)
        cache.keys.zero_()
        cache.values.zero_()
        return cache

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """As :meth:`smalto.models.gpt.GPT.step`; the logits are overwritten by the next step on a GPU."""
        cache.check(1)
        for buffer in (cache.keys, cache.values):
            torch._dynamo.mark_static_address(buffer)  # a recorded graph writes into it, no copy is made
        torch.compiler.cudagraph_mark_step_begin()
        at = torch.full((1,), cache.length, device=self.table.device)
        logits: Tensor = self._compiled(codes, at, cache.keys, cache.values, cache.prefix_mask)
        cache.advance(1)
        return logits

    def _at(self, codes: Tensor, at: Tensor, keys: Tensor, values: Tensor, prefix_mask: Tensor | None) -> Tensor:
        """Logits (B, V) behind codes (B,) at position ``at`` (1,), written into keys and values (N, B, KV, S, D)."""
        length = keys.shape[3]
        visible = (torch.arange(length, device=at.device) <= at).view(1, 1, 1, length)
        if prefix_mask is not None:
            shown = F.pad(prefix_mask, (0, length - prefix_mask.shape[1]), value=True)
            visible = visible & shown[:, None, None, :]
        turn = self.table.index_select(0, at)
        x = self.model.token_embedding(codes).float()
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(self._normalise(x, layer.attention_floor)).view(len(codes), 1, -1, self.head_dim)
            q, k, v = qkv.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
            keys[i].index_copy_(2, at, apply_rope(k, turn).transpose(1, 2))
            values[i].index_copy_(2, at, v.transpose(1, 2))
            q = apply_rope(q, turn).transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                q, keys[i], values[i], attn_mask=visible, scale=1.0, enable_gqa=self.grouped
            )
            x = x + layer.proj(attended.transpose(1, 2).reshape(len(codes), -1))
            gate, up = layer.gate_up(self._normalise(x, layer.ffn_floor)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        return self.output(self._normalise(x, self.floor)).float()
