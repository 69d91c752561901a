"""Decode images code by code: one prefill, then one step per code, with a cache that lives only here."""

from typing import Protocol

import torch
from torch import Tensor

from smalto.errors import InputError
from smalto.nn.kv_cache import KVCache
from smalto.sampling.logits import next_codes
from smalto.types import SamplingConfig


class NullCondition(Protocol):
    """The part of a conditioner that guidance needs."""

    def null(self, batch_size: int) -> Tensor:
        """The null condition of ``batch_size`` rows."""
        ...


class CausalModel(Protocol):
    """A model that decodes one code after another."""

    num_codes: int
    conditioner: NullCondition

    def new_cache(self, batch_size: int) -> KVCache:
        """An empty cache."""
        ...

    def prefill(self, condition: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) of the first code."""
        ...

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V) of the next code."""
        ...


def uniforms_from_seeds(seeds: Tensor, count: int) -> Tensor:
    """One stream of uniforms in [0, 1) per seed, float32 (B, count) on the CPU.

    Each image owns its generator, so image i is drawn with the same numbers whatever the batch, its order or the number
    of processes.
    """
    generator = torch.Generator()
    rows = [torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
    return torch.stack(rows) if rows else torch.empty(0, count)


@torch.inference_mode()
def generate(
    model: CausalModel,
    condition: Tensor,
    *,
    sampling: SamplingConfig,
    uniforms: Tensor,
    condition_mask: Tensor | None = None,
) -> Tensor:
    """Write images.

    With guidance the batch is doubled, conditional rows first. Once ``cfg_interval`` is passed, the unconditional
    half is dropped from the cache, not just ignored. The caller's tensors are left as they were.

    Args:
        model: in eval mode.
        condition: what the model's conditioner takes, B rows.
        sampling: how codes are drawn.
        uniforms: float (B, num_codes), see :func:`uniforms_from_seeds`.
        condition_mask: bool (B, P), True at valid condition tokens; the null half uses the same.

    Returns:
        int64 (B, num_codes) in generation order.

    Raises:
        ValueError: logits that are not finite.
    """
    batch_size = condition.shape[0]
    guided = sampling.cfg_scale > 1
    if guided:
        condition = torch.cat([condition, model.conditioner.null(batch_size).to(condition.dtype)])
        condition_mask = None if condition_mask is None else torch.cat([condition_mask, condition_mask])
    uniforms = uniforms.to(condition.device)
    cache = model.new_cache(condition.shape[0])
    logits = model.prefill(condition, cache, condition_mask)
    codes: list[Tensor] = []
    sums: list[Tensor] = []
    for i in range(model.num_codes):
        if guided:
            cond, uncond = logits.chunk(2)
            logits = (cond - uncond) * sampling.cfg_scale + uncond
        sums.append(logits.sum(-1))
        codes.append(next_codes(logits, uniforms[:, i], sampling))
        if i + 1 == model.num_codes:
            break
        # Code i + 1 comes from decode step i; the interval counts decode steps, and prefill is always guided.
        if guided and 0 <= sampling.cfg_interval < i:
            guided = False
            cache.keep_rows(batch_size)
        logits = model.step(torch.cat([codes[-1]] * 2) if guided else codes[-1], cache)
    _check_finite(torch.stack(sums, dim=1))
    return torch.stack(codes, dim=1)


def _check_finite(sums: Tensor) -> None:
    """Refuse images of which a code was drawn from logits that are no numbers; looked at once, not per step."""
    broken = ~sums.isfinite()
    if bool(broken.any()):
        step = int(broken.any(dim=0).int().argmax())
        raise InputError(
            f"the model's logits are not finite (NaN or infinite) for {int(broken.any(dim=1).sum())} of {len(sums)} "
            f"images, from code {step} on: its weights or its conditions are broken, or overflow in this precision; "
            "try an earlier checkpoint, or engine.dtype=fp32"
        )
