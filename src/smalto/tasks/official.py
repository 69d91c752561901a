"""The LlamaGen authors' checkpoint files: wrappers, prefixes, leftovers, and the names of tensors.

Pure functions on dicts; what a network looks like is read from its tensors in
:mod:`smalto.tasks.official_config`.
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from smalto.errors import InputError

WRAPPERS = ("model", "module", "state_dict")
"""Where weights lie in a file: DDP training, DeepSpeed, Lightning; FSDP wrote them without a wrapper."""
INNER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.")
"""Left by torch.compile and FSDP, anywhere in a name."""
LEFTOVERS = ("freqs_cis", "k_cache", "v_cache")
"""Tables and caches that older files carry; they are computed, not learnt."""
USAGE_QUEUE = "quantize.codebook_used"
"""The last 65,536 codes of training, a buffer that the authors' strict load demands and nothing else uses."""
USAGE_QUEUE_LENGTH = 65_536
BUFFERS = (USAGE_QUEUE, "cls_embedding.uncond_embedding")
"""Not averaged by the authors' EMA, so an average without them is whole."""

GPT_NAMES = (
    ("conditioner.embedding.", "cls_embedding.embedding_table."),
    ("conditioner.null_features", "cls_embedding.uncond_embedding"),
    ("conditioner.fc", "cls_embedding.cap_proj.fc"),
    ("token_embedding.", "tok_embeddings."),
    ("blocks.", "layers."),
    ("attention.qkv.", "attention.wqkv."),
    ("attention.proj.", "attention.wo."),
    ("ffn.gate.", "feed_forward.w1."),
    ("ffn.down.", "feed_forward.w2."),
    ("ffn.up.", "feed_forward.w3."),
)
TOKENIZER_NAMES = (
    ("quantizer.codebook.", "quantize.embedding."),
    (".levels.", ".conv_blocks."),
    (".shortcut.", ".nin_shortcut."),
    (".attention.", ".attn."),
    (".proj.", ".proj_out."),
    (".middle.", ".mid."),
)


def official_name(kind: str, name: str) -> str:
    """The authors' name of one of our tensors (``kind`` is ``gpt`` or ``tokenizer``).

    The way back needs no table: a network built by us knows its own names.
    """
    for ours, theirs in GPT_NAMES if kind == "gpt" else TOKENIZER_NAMES:
        name = name.replace(ours, theirs)
    if kind == "tokenizer":  # one name of ours for two of theirs
        name = name.replace(".resample.", ".downsample." if name.startswith("encoder.") else ".upsample.")
    return name


def plain_name(name: str) -> str:
    """A name without what data parallelism, compilation and sharding put around it."""
    for prefix in INNER_PREFIXES:
        name = name.replace(prefix, "")
    return re.sub(r"^(module\.)+", "", name)


def which_weights(content: Any) -> str:
    """Those that the authors' scripts for sampling and for extracting codes read: ``model``, ``ema`` if it is alone."""
    alone = isinstance(content, dict) and isinstance(content.get("ema"), dict) and _wrapper(content) is None
    return "ema" if alone else "model"


def has_both(content: Any) -> bool:
    """Whether a file holds trained and averaged weights."""
    return isinstance(content, dict) and isinstance(content.get("ema"), dict) and _wrapper(content) is not None


def _wrapper(content: dict[str, Any]) -> str | None:
    return next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)


def official_weights(content: Any, *, which: str, path: Path) -> dict[str, Tensor]:
    """The weights in the content of a file by plain names, without leftovers.

    Args:
        content: what the file holds.
        which: ``ema`` or ``model`` (the trained weights, whatever their wrapper is called), see :func:`which_weights`.
        path: for messages.

    Raises:
        ValueError: no weights in it, or something that is not a tensor among them.
    """
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds {_described(content)}, a dict of weights is needed; give a model checkpoint")
    wrapper = _wrapper(content)
    if which == "ema" and not isinstance(content.get("ema"), dict):
        raise InputError(f"{path} has no averaged weights (it holds {_listed(content)}); use weights=model")
    if which == "ema":
        weights = _tensors(content["ema"], path)
        trained = _tensors(content[wrapper], path) if wrapper else {}
        return weights | {name: trained[name] for name in BUFFERS if name in trained and name not in weights}
    return _tensors(content[wrapper] if wrapper else content, path)


def _tensors(weights: dict[str, Any], path: Path) -> dict[str, Tensor]:
    others = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(
            f"{path} holds no weights where they were looked for: {_listed(others)} are not tensors; they are "
            "expected under model, ema, module, state_dict, or without any wrapper"
        )
    plain: dict[str, Tensor] = {}
    for key, value in weights.items():
        name = plain_name(str(key))
        if name.rsplit(".", 1)[-1] in LEFTOVERS:
            continue
        if name in plain:
            raise InputError(f"{path} holds {name} twice, once under another prefix; save one of the two alone")
        plain[name] = value
    return plain


def kind_of(names: Iterable[str], path: Path) -> str:
    """``gpt`` or ``tokenizer``, by the names of the tensors.

    Raises:
        ValueError: neither.
    """
    names = list(names)
    if any(name.startswith(("layers.", "tok_embeddings.", "cls_embedding.")) for name in names):
        return "gpt"
    if any(name.startswith(("encoder.", "decoder.", "quantize.")) for name in names):
        return "tokenizer"
    raise InputError(
        f"{path} is neither a tokenizer nor a generator of LlamaGen: its tensors are {_listed(names)}; "
        "give one of the released files, or a checkpoint of smalto"
    )


ARGUMENTS = {"image_size": int, "downsample_size": int, "codebook_l2_norm": bool, "gpt_model": str, "vq_model": str}
"""Of the command line of the authors' training, what says something of the network."""


def arguments(content: Any) -> dict[str, Any]:
    """Of the command line of the training run, where the file has it, what is known and of its kind."""
    found = content.get("args") if isinstance(content, dict) else None
    given = vars(found) if isinstance(found, argparse.Namespace) else {}
    return {
        key: given[key]
        for key, kind in ARGUMENTS.items()
        if type(given.get(key)) is kind and not (kind is int and not 0 < given[key] < 2**16)
    }


def _listed(names: Iterable[str], limit: int = 6) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _described(content: Any) -> str:
    return "an empty dict" if content == {} else f"a {type(content).__name__}"
