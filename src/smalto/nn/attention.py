"""Multi-head attention with grouped keys and values, rotary positions and an optional cache.

Legend: B batch, T positions, H heads, D head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.kv_cache import KVCache
from smalto.nn.rope import apply_rope


class Attention(nn.Module):
    """Self-attention without biases; the packed projection holds all queries, then keys, then values."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        attn_dropout: float = 0.0,
        resid_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        if dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads})")
        if num_heads % num_kv_heads:
            raise InputError(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = dim // num_heads
        self.attn_dropout = attn_dropout
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(resid_dropout)

    def forward(
        self,
        x_BTC: Tensor,
        rope: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend causally, or by ``mask``.

        Args:
            x_BTC: (B, T, dim).
            rope: (T, D / 2, 2), the table rows of these T positions.
            mask: bool, broadcastable to (B, H, T, S), True where attention is allowed. Without one a causal
                rule holds among the T new positions (and flash kernels stay available).
            cache: keys and values of earlier positions; the new ones are appended.
            layer: index of this layer in the cache.

        Returns:
            (B, T, dim).
        """
        batch, length, dim = x_BTC.shape
        heads = self.qkv(x_BTC).view(batch, length, self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        q, k = apply_rope(q, rope).transpose(1, 2), apply_rope(k, rope).transpose(1, 2)
        v = v.transpose(1, 2)
        fresh = cache is None or cache.length == 0
        if cache is not None:
            k, v = cache.update(layer, k, v)
        assert mask is not None or fresh or length == 1, "several positions behind a filled cache need a mask"
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=mask is None and length > 1,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.resid_dropout(self.proj(out.transpose(1, 2).reshape(batch, length, dim)))
