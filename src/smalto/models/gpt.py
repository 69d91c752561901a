"""The autoregressive transformer of LlamaGen (section 2.2): Llama blocks over condition tokens and image codes.

Two ways in: :meth:`GPT.forward` trains (all positions at once), :meth:`GPT.prefill` and :meth:`GPT.step` decode
with a cache that the caller owns.

Legend: B batch, L codes of an image, P condition tokens, T positions, C width, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smalto.errors import InputError
from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.nn.block import TransformerBlock
from smalto.nn.initial import draw_normal
from smalto.nn.kv_cache import KVCache
from smalto.nn.norm import RMSNorm
from smalto.nn.rope import axial_rope
from smalto.types import CodeShape


class GPT(nn.Module):
    """Decoder-only transformer that writes an image code by code, in raster order.

    Args:
        dim: width.
        num_layers: blocks.
        num_heads: attention heads.
        vocab_size: codebook size of the tokenizer.
        code_shape: ``((rows, columns),)`` of the tokenizer's grid.
        conditioner: makes the conditioner, given ``dim``.
        num_kv_heads: heads of keys and values; fewer than ``num_heads`` is grouped-query attention.
        ffn_multiple_of: the feed-forward width is rounded up to it.
        rope_base: wavelength base of the rotary embedding.
        norm_eps: of every RMSNorm.
        token_dropout: on the embedded sequence, condition included.
        attn_dropout: on attention probabilities. The paper's "0.1 on attention" is ``resid_dropout``.
        resid_dropout: on the output of attention.
        ffn_dropout: on the output of the feed-forward layer.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        init_std: of all linear and embedding weights; the output layer starts at zero (initial loss ln V).
        condition_rope: ``zero`` or ``identity``, see :func:`smalto.nn.rope.axial_rope`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        vocab_size: int,
        code_shape: Sequence[Sequence[int]],
        conditioner: Callable[..., ClassConditioner | TextConditioner],
        num_kv_heads: int | None = None,
        ffn_multiple_of: int = 256,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        token_dropout: float = 0.1,
        attn_dropout: float = 0.0,
        resid_dropout: float = 0.1,
        ffn_dropout: float = 0.1,
        drop_path: float = 0.0,
        init_std: float = 0.02,
        condition_rope: str = "zero",
    ) -> None:
        super().__init__()
        if len(code_shape) != 1 or len(code_shape[0]) != 2:
            raise InputError(f"code_shape is {code_shape}; a raster model takes one grid, ((rows, columns),)")
        if dim % num_heads:
            raise InputError(f"dim ({dim}) must be divisible by num_heads ({num_heads})")
        rows, columns = code_shape[0]
        self.code_shape: CodeShape = ((rows, columns),)
        self.num_codes = rows * columns
        self.vocab_size = vocab_size
        self.dim = dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_dim = dim // num_heads
        self.init_std = init_std
        self.rope_base = rope_base
        self.condition_rope = condition_rope
        self.conditioner: ClassConditioner | TextConditioner = conditioner(dim=dim)
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.token_dropout = nn.Dropout(token_dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                ffn_multiple_of=ffn_multiple_of,
                norm_eps=norm_eps,
                attn_dropout=attn_dropout,
                resid_dropout=resid_dropout,
                ffn_dropout=ffn_dropout,
                drop_path=drop_path * i / max(num_layers - 1, 1),
            )
            for i in range(num_layers)
        )
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.register_buffer("rope", self._rope_table(), persistent=False)
        self.recompute_every = 0
        """In training, blocks 0, n, 2 n, ... keep only their input and run again in the backward pass; 0: none does."""
        self.init_weights()

    rope: Tensor

    def _rope_table(self) -> Tensor:
        return axial_rope(
            self.code_shape[0],
            self.head_dim,
            base=self.rope_base,
            prefix=self.conditioner.num_tokens,
            prefix_mode=self.condition_rope,
        )

    def init_weights(self) -> None:
        """Draw all parameters and rebuild the rotary table; a meta-device build needs it after ``to_empty``.

        One number is taken from the global generator; the rest follows from it and the parameters' names, see
        :mod:`smalto.nn.initial`.
        """
        seed = int(torch.randint(2**62, (), device="cpu"))
        for prefix, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif module is self.output:
                nn.init.zeros_(self.output.weight)
            elif isinstance(module, (nn.Linear, nn.Embedding)):
                draw_normal(module.weight, std=self.init_std, seed=seed, name=f"{prefix}.weight")
            elif isinstance(module, TextConditioner):
                draw_normal(module.null_features, std=module.null_std, seed=seed, name=f"{prefix}.null_features")
        self.rope = self._rope_table().to(self.rope.device)

    def compile_blocks(self) -> None:
        """Compile each block's training pass; parameters keep their names, evaluation and decoding stay eager.

        One graph serves all blocks, and each block's gradients are there as soon as its own backward pass has run, so
        that they are exchanged beside that of the others. What cannot be one graph is an error.
        """
        torch._dynamo.config.optimize_ddp = False  # it would cut every block again, wherever DDP's buckets end
        compiled = torch.compile(TransformerBlock.compute, fullgraph=True)
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            block.compiled = compiled

    def forward(self, codes: Tensor, condition: Tensor, condition_mask: Tensor | None = None) -> Tensor:
        """Logits of every code given the condition and all earlier codes (teacher forcing).

        Args:
            codes: int64 (B, L); position i of the result sees codes < i only.
            condition: what the conditioner takes: int64 labels (B,), or text features (B, P, text_dim).
            condition_mask: bool (B, P), True at valid condition tokens; None means all are valid.

        Returns:
            (B, L, V), float32 outside autocast.
        """
        return self.output(self._hidden(codes, condition, condition_mask))

    def apply_head(
        self,
        codes: Tensor,
        condition: Tensor,
        condition_mask: Tensor | None = None,
        *,
        head: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """``head(hidden, weight)`` in place of the output layer, for losses that never hold all logits.

        Args:
            codes: as in :meth:`forward`, like the other conditions.
            condition: see there.
            condition_mask: see there.
            head: of what the output layer would read, (B, L, dim), and its weight, (V, dim).
        """
        return head(self._hidden(codes, condition, condition_mask), self.output.weight)

    def _hidden(self, codes: Tensor, condition: Tensor, condition_mask: Tensor | None) -> Tensor:
        """What the output layer makes the logits of :meth:`forward` of, (B, L, dim)."""
        prefix = self.conditioner(condition)
        num_condition = prefix.shape[1]
        x = torch.cat([prefix, self.token_embedding(codes[:, :-1])], dim=1)
        mask = None if condition_mask is None else self._causal_mask(condition_mask, x.shape[1])
        x = self.token_dropout(x)
        rope = self.rope[: x.shape[1]]
        every = self.recompute_every if self.training else 0
        for i, block in enumerate(self.blocks):
            if every and i % every == 0:
                x = checkpoint(block, x, rope, mask=mask, use_reentrant=False)
            else:
                x = block(x, rope, mask=mask)
        return self.norm(x[:, num_condition - 1 :])

    @staticmethod
    def _causal_mask(condition_mask: Tensor, length: int) -> Tensor:
        """Bool (B, 1, T, T): causal, padded condition tokens hidden from all but themselves."""
        batch, num_condition = condition_mask.shape
        visible = condition_mask.new_ones(batch, length)
        visible[:, :num_condition] = condition_mask
        causal = condition_mask.new_ones(length, length).tril()
        diagonal = torch.eye(length, dtype=torch.bool, device=condition_mask.device)
        return ((causal & visible[:, None, :]) | diagonal).unsqueeze(1)

    def new_cache(self, batch_size: int) -> KVCache:
        """A cache for one image per row, in the dtype and on the device of the weights."""
        weight = self.token_embedding.weight
        return KVCache(
            num_layers=len(self.blocks),
            batch_size=batch_size,
            num_kv_heads=self.num_kv_heads,
            max_length=self.conditioner.num_tokens + self.num_codes - 1,
            head_dim=self.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def prefill(self, condition: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        """Read the condition into an empty cache; logits (B, V) of the first code, float32."""
        assert cache.length == 0, "prefill starts from an empty cache; call cache.reset()"
        prefix = self.conditioner(condition)
        mask = None
        if condition_mask is not None:
            cache.prefix_mask = condition_mask
            mask = self._causal_mask(condition_mask, prefix.shape[1])
        return self._decode(prefix, cache, mask)

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Append one code per row, int64 (B,); logits (B, V) of the next, float32."""
        mask = None
        if cache.prefix_mask is not None:
            generated = cache.prefix_mask.new_ones(codes.shape[0], cache.length + 1 - cache.prefix_mask.shape[1])
            mask = torch.cat([cache.prefix_mask, generated], dim=1)[:, None, None, :]
        return self._decode(self.token_embedding(codes).unsqueeze(1), cache, mask)

    def _decode(self, x: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor:
        rope = self.rope[cache.length : cache.length + x.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask=mask, cache=cache, layer=i)
        cache.advance(x.shape[1])
        return self.output(self.norm(x[:, -1])).float()
