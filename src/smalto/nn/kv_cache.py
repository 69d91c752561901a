"""Keys and values of what was already decoded. The caller owns it; no module keeps it."""

import torch
from torch import Tensor

from smalto.errors import InputError


class KVCache:
    """Static buffers of ``max_length`` positions for every layer, filled from the front.

    A tensor per layer: a compiler writes into a whole tensor in place, but copies one that it sees a part of.

    Every layer writes at ``length`` and reads the filled prefix; the model calls :meth:`advance` once per
    forward, after its last layer.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.max_length = max_length
        """Positions the buffers can hold."""
        self.length = 0
        self.prefix_mask: Tensor | None = None
        """bool (B, prefix), False at padded condition tokens, which later positions must not see."""

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, H, t, D) of the next t positions; returns views of everything filled, (B, H, length + t, D)."""
        end = self.length + keys.shape[2]
        self.check(keys.shape[2])
        all_keys, all_values = self.keys[layer], self.values[layer]
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def check(self, more: int) -> None:
        """Raise ValueError unless ``more`` positions are left."""
        if self.length + more > self.max_length:
            raise InputError(f"KV cache holds {self.max_length} positions, {self.length + more} were asked for")

    def advance(self, steps: int) -> None:
        """Declare ``steps`` more positions filled, after all layers have written them."""
        self.length += steps

    def keep_rows(self, batch_size: int) -> None:
        """Forget all but the first rows of the batch, for instance the unconditional half."""
        self.keys = [keys[:batch_size] for keys in self.keys]
        self.values = [values[:batch_size] for values in self.values]
        if self.prefix_mask is not None:
            self.prefix_mask = self.prefix_mask[:batch_size]

    def reset(self) -> None:
        """Empty the cache for another sequence of the same batch size."""
        self.length = 0
        self.prefix_mask = None
