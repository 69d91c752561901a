"""The pre-norm residual pair: the unit that FSDP shards and activation checkpointing recomputes."""

from collections.abc import Callable

from torch import Tensor, nn

from smalto.nn.attention import Attention
from smalto.nn.kv_cache import KVCache
from smalto.nn.mlp import SwiGLU, swiglu_hidden_size
from smalto.nn.norm import RMSNorm
from smalto.nn.regularize import DropPath


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_multiple_of: int = 256,
        norm_eps: float = 1e-5,
        attn_dropout: float = 0.0,
        resid_dropout: float = 0.0,
        ffn_dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(
            dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            attn_dropout=attn_dropout,
            resid_dropout=resid_dropout,
        )
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)
        self.ffn = SwiGLU(dim, swiglu_hidden_size(dim, ffn_multiple_of), dropout=ffn_dropout)
        self.drop_path = DropPath(drop_path)
        self.compiled: Callable[..., Tensor] | None = None
        """A compiled :meth:`compute`, for training. Inside of the call, so that hooks of FSDP run outside of graphs."""

    def forward(
        self,
        x_BTC: Tensor,
        rope: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(B, T, dim) to (B, T, dim); arguments as in :class:`Attention`."""
        if self.compiled is not None and self.training and cache is None:
            return self.compiled(self, x_BTC, rope, mask)
        return self.compute(x_BTC, rope, mask, cache, layer)

    def compute(
        self, x_BTC: Tensor, rope: Tensor, mask: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """What :meth:`forward` does, never through what was compiled."""
        attended = self.attention(self.attention_norm(x_BTC), rope, mask=mask, cache=cache, layer=layer)
        x_BTC = x_BTC + self.drop_path(attended)
        return x_BTC + self.drop_path(self.ffn(self.ffn_norm(x_BTC)))
