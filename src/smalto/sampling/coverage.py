"""Whether the decode engine computes what a model computes: it re-implements the blocks of :class:`GPT`, so a change in
them that it does not know of would be left out without a word.
"""

from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from smalto.errors import InputError
from smalto.models.conditioner import TextConditioner
from smalto.models.gpt import GPT
from smalto.nn.kv_cache import KVCache

TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.3, "int8": 0.4}
"""Distance of logits (root mean square) as a share of their spread that rounding may explain.

Seen at most 1e-5, 0.004, 0.14 and 0.21, in random models of 2 to 36 layers with weights of up to 15 times their usual
size. Halves of the gate exchanged, scores scaled wrongly, a mask or a bias left out: 0.5 to 1.4 in a model like B.
"""
_OTHER_DEVICES = 0.05
"""The least tolerance there: float32 products may be TF32, with the 11 bits of float16."""

_WAY_OUT = (
    "smalto.sampling.autoregressive.generate takes the model itself in the engine's place, at a few times the time; "
    "or take the change back"
)
_METHODS = ("forward", "prefill", "step")
_compared: "WeakSet[nn.Module]" = WeakSet()


class _Engine(Protocol):
    dtype: str
    compute: torch.dtype

    def _embed(self, condition: Tensor) -> Tensor: ...
    def _decode(self, x_BTC: Tensor, cache: KVCache, mask: Tensor | None) -> Tensor: ...


def check_structure(model: GPT) -> None:
    """Compare a model, module by module, with a plain GPT of its sizes, which is what the engine computes.

    Raises:
        ValueError: modules of other types, with hooks or a ``forward`` of their own; parameters, buffers or sizes that
            a plain GPT has not got, or lacks.
    """
    problems = list(_differences(model))
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"the decode engine does not cover this model: {'; '.join(problems[:3])}{more}. {_WAY_OUT}")


def _differences(model: GPT) -> Iterator[str]:
    if _plain_type(model) is not GPT:
        yield f"it is a {_plain_type(model).__name__}, the engine knows GPT"
        return
    blocks = list(model.blocks)
    plain = _plain_gpt(model)
    yield from _compare(model, plain, "", leave_out=("conditioner", "blocks"))
    for number, block in enumerate(blocks):
        yield from _compare(block, plain.blocks[0], f"blocks.{number}.")
    conditioner = model.conditioner
    if isinstance(conditioner, TextConditioner):  # its matrices are packed; others are called as they are
        with torch.device("meta"):
            text = TextConditioner(
                dim=model.dim, text_dim=conditioner.text_dim, num_tokens=conditioner.num_tokens, drop_prob=0.0
            )
        yield from _compare(conditioner, text, "conditioner.")


def _plain_gpt(model: GPT) -> Any:
    """One block, on the meta device; no random number is used up."""
    conditioner: Any = nn.Module()
    conditioner.num_tokens = model.conditioner.num_tokens
    hidden = getattr(getattr(model.blocks[0], "ffn", None), "gate", None)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return GPT(
            dim=model.dim,
            num_layers=1,
            num_heads=model.dim // model.head_dim,
            vocab_size=model.vocab_size,
            code_shape=model.code_shape,
            conditioner=lambda dim: conditioner,
            num_kv_heads=model.num_kv_heads,
            ffn_multiple_of=getattr(hidden, "out_features", 256),
        )


def _compare(module: nn.Module, plain: nn.Module, name: str, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    def covered(tree: nn.Module) -> dict[str, nn.Module]:
        return {path: part for path, part in tree.named_modules() if path.split(".")[0] not in leave_out}

    parts, expected = covered(module), covered(plain)
    strange: set[str] = set()  # whose own parts need no word
    for path in sorted(parts.keys() | expected.keys()):
        part, known = parts.get(path), expected.get(path)
        full = f"{name}{path}".rstrip(".") or "the model"
        if path and path.rpartition(".")[0] in strange:
            strange.add(path)
            continue
        if part is None or known is None or _plain_type(part) is not type(known):
            strange.add(path)
            found = "missing" if part is None else f"a {_plain_type(part).__name__}"
            yield f"{full} is {found}, {'which it does not know' if known is None else f'not a {type(known).__name__}'}"
            continue
        yield from (f"{full} has a {method} of its own" for method in _METHODS if method in vars(part))
        if not isinstance(part, GPT):  # which nothing calls in decoding: hooks on it are not left out
            yield from (f"{full} has a forward hook" for _ in _hooks(part))
            yield from _compare_sizes(part, known, full)
        yield from _compare_tensors(part, known, full)


def _compare_sizes(part: nn.Module, known: nn.Module, name: str) -> Iterator[str]:
    for key, value in vars(known).items():
        if isinstance(value, int) and not isinstance(value, bool) and getattr(part, key, None) != value:
            yield f"{name}.{key} is {getattr(part, key, None)}, not {value}"


def _compare_tensors(part: nn.Module, known: nn.Module, name: str) -> Iterator[str]:
    for kind in ("parameter", "buffer"):
        have, want = (dict(getattr(m, f"named_{kind}s")(recurse=False)) for m in (part, known))
        for key in sorted(have.keys() ^ want.keys()):
            yield f"{name}.{key} is {'missing' if key in want else f'a {kind} it does not read'}"
        for key in have.keys() & want.keys():
            if have[key].shape != want[key].shape:
                yield f"{name}.{key} has shape {tuple(have[key].shape)}, not {tuple(want[key].shape)}"


def _plain_type(module: nn.Module) -> type:
    """Its class; of a sharded module the one that it had before (FSDP2 puts one of its own in front)."""
    kind = type(module)
    return kind.__mro__[2] if isinstance(module, FSDPModule) else kind


def _hooks(module: nn.Module) -> Iterator[Any]:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not (isinstance(module, FSDPModule) and type(getattr(hook, "__self__", None)).__name__ == "FSDPState"):
            yield hook


@torch.no_grad()
def check_logits(model: GPT, engine: _Engine) -> None:
    """Compare the engine's logits with the model's, once per model: an image of no condition and two codes.

    A row of the model costs as much as reading all of its weights (65 ms for B on one core, packing takes 170), so that
    engines built later for the same model, with other weights and the same structure, are not compared again. Sharded
    models are not: all processes would have to take part.

    Raises:
        ValueError: they differ by more than rounding.
    """
    if model in _compared or any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found, expected = _logits_of_both(model, engine)
    finally:
        for module, training in modes.items():
            module.training = training
    allowed = _tolerance(model, engine.dtype)
    distance, spread = (found - expected).square().mean().sqrt(), expected.std()
    # Logits that are no numbers pass here: they are reported where codes are drawn from them.
    differs, seen = torch.stack([(distance > allowed * spread) & distance.isfinite(), spread > 0]).tolist()
    if differs:
        raise InputError(
            f"the decode engine computes other logits than the model in {engine.dtype}: they lie "
            f"{float(distance / spread):.2g} of their spread apart, rounding explains {allowed:g}. "
            f"Does the model compute something that the engine does not know of? {_WAY_OUT}"
        )
    if seen:  # not of the output layer as it is at the start of a training, which is zero
        _compared.add(model)


def _logits_of_both(model: GPT, engine: _Engine) -> list[Tensor]:
    device, length = model.rope.device, min(2, model.num_codes - 1)
    condition = model.conditioner.null(1)
    codes = torch.arange(length, device=device).remainder_(model.vocab_size).unsqueeze(0)
    logits = []
    with torch.autocast(device.type, enabled=False):
        drawn = model.token_embedding(codes)
        for decoder, prefix, dtype in (
            (engine, engine._embed(condition), engine.compute),
            (model, model.conditioner(condition), drawn.dtype),
        ):
            x = torch.cat([prefix[:, :2], drawn.to(prefix.dtype)], dim=1)
            cache = KVCache(
                num_layers=len(model.blocks),
                batch_size=1,
                num_kv_heads=model.num_kv_heads,
                max_length=x.shape[1],
                head_dim=model.head_dim,
                dtype=dtype,
                device=device,
            )
            logits.append(decoder._decode(x, cache, None))
    return logits


def _tolerance(model: GPT, dtype: str) -> float:
    of_weights = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.output.weight.dtype, "fp32")
    allowed = max(TOLERANCE[dtype], TOLERANCE[of_weights])
    return allowed if model.rope.device.type == "cpu" else max(allowed, _OTHER_DEVICES)
