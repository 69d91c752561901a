"""Decode images code by code: one prefill, then one step per code, with a cache that lives only here."""

from typing import Protocol, runtime_checkable

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


class Draft:
    """Images being written: their codes so far, and what the next are drawn with. B images of L codes.

    Args:
        uniforms: float (B, L), one for each code.
        sampling: how codes are drawn.
    """

    def __init__(self, uniforms: Tensor, sampling: SamplingConfig) -> None:
        self.uniforms, self.sampling = uniforms, sampling
        self.codes = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        self.sums = torch.zeros(uniforms.shape, dtype=torch.float32, device=uniforms.device)
        """Of the logits that each code was drawn from; looked at once, at the end."""

    def draw(self, i: int, logits: Tensor) -> None:
        """Write code ``i``, drawn from logits (B, V), or (2 B, V) under guidance."""
        if len(logits) > len(self.codes):
            logits = guided_logits(logits, self.sampling.cfg_scale)
        self.sums[:, i] = logits.sum(-1)
        self.codes[:, i] = next_codes(logits, self.uniforms[:, i], self.sampling)


@runtime_checkable
class WritesDrafts(Protocol):
    """A :class:`CausalModel` that takes a step and draws from it in one, into a draft that it keeps."""

    def new_draft(self, uniforms: Tensor, sampling: SamplingConfig) -> Draft:
        """An empty draft; valid until the next one."""
        ...

    def write(self, draft: Draft, i: int, cache: KVCache) -> None:
        """Append code ``i - 1`` to the cache and write code ``i``; guided where the cache has rows for it."""
        ...


def guided_logits(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: (2 B, V), conditional rows first, to (B, V)."""
    cond, uncond = logits.chunk(2)
    return (cond - uncond) * scale + uncond


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
        model: in eval mode; may be one that :class:`WritesDrafts`.
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
    writer = model if isinstance(model, WritesDrafts) else None
    draft = writer.new_draft(uniforms, sampling) if writer else Draft(uniforms, sampling)
    draft.draw(0, model.prefill(condition, cache, condition_mask))
    for i in range(1, model.num_codes):
        # Code i comes from decode step i - 1; the interval counts decode steps, and prefill is always guided.
        if guided and 0 <= sampling.cfg_interval < i - 1:
            guided = False
            cache.keep_rows(batch_size)
        if writer:
            writer.write(draft, i, cache)
        else:
            last = draft.codes[:, i - 1]
            draft.draw(i, model.step(torch.cat([last, last]) if guided else last, cache))
    _check_finite(draft.sums)
    return draft.codes.clone()


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
