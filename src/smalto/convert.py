"""``smalto convert``: the LlamaGen authors' checkpoints in and out, and safetensors, without building a network."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from smalto.errors import InputError, PathInUse
from smalto.runtime import hydra_main
from smalto.tasks.export import write_weights
from smalto.tasks.official_config import Hints
from smalto.tasks.safetensors import SUFFIX
from smalto.tasks.weights import Weights, downsample_factor, read_weights, with_tokenizer

log = logging.getLogger(__name__)

FORMATS = ("smalto", "official", "safetensors")


def run(config: DictConfig) -> dict[str, Any]:
    """Write ``in`` as ``out`` in another format; tensors keep their bits.

    Returns:
        ``out`` (the files), ``kind``, ``parameters``, ``step``.

    Raises:
        ValueError: a file that is not what it should be, options that say nothing here, or too few of them.
        FileNotFoundError: no such file.
        FileExistsError: ``out`` is there already.
    """
    source, out = Path(config["in"]), Path(config.out)
    check_options(config, source, out)
    hints = Hints(**{key: config[key] for key in ("image_size", "downsample_factor", "num_heads", "l2_norm", "force")})
    tokenizer = None
    if config.tokenizer_ckpt is not None:
        tokenizer = read_weights(
            config.tokenizer_ckpt, hints=Hints(l2_norm=config.l2_norm, force=config.force), verify=config.verify
        )
        if tokenizer.kind != "tokenizer":
            raise InputError(f"tokenizer_ckpt={config.tokenizer_ckpt} holds a {tokenizer.kind}, give a tokenizer")
        factor = downsample_factor(tokenizer.net)
        if hints.downsample_factor not in (None, factor):
            raise InputError(
                f"downsample_factor is {hints.downsample_factor}, the tokenizer {config.tokenizer_ckpt} has {factor}; "
                "leave it out"
            )
        hints = replace(hints, downsample_factor=factor)
    weights = read_weights(source, hints=hints, which=config.weights, verify=config.verify)
    weights = apply_hints(weights, tokenizer, config, source)
    if tokenizer is not None:
        weights = with_tokenizer(weights, tokenizer, paths=(source, Path(config.tokenizer_ckpt)))
    written = write_weights(weights, out, layout=config.format)
    parameters = sum(tensor.numel() for tensor in weights.state.values())
    log.info("%s (%s of %s numbers) written to %s", source, weights.kind, f"{parameters:,}", out)
    if config.format == "official" and weights.tokenizer:
        log.info("the authors keep the tokenizer in a file of its own; the one inside %s was left out", source)
    return {
        "out": [str(path) for path in written],
        "kind": weights.kind,
        "parameters": parameters,
        "step": weights.step,
    }


def check_options(config: DictConfig, source: Path, out: Path) -> None:
    """Refuse what cannot be before a large file is read."""
    problems = []
    if config.format not in FORMATS:
        problems.append(f"format is {config.format!r}, must be one of {', '.join(FORMATS)}")
    elif (out.suffix == SUFFIX) != (config.format == "safetensors"):
        problems.append(f"out={out} and format={config.format}: safetensors files, and only they, end in {SUFFIX}")
    for key in ("overwrite", "force", "verify"):
        if not isinstance(config[key], bool):
            problems.append(f"{key} is {config[key]!r}, must be true or false")
    if config.l2_norm not in (None, True, False):
        problems.append(f"l2_norm is {config.l2_norm!r}, must be true or false")
    if config.weights not in (None, "ema", "model"):
        problems.append(f"weights is {config.weights!r}, must be ema or model")
    for key in ("image_size", "downsample_factor", "num_heads"):
        if config[key] is not None and not (isinstance(config[key], int) and config[key] > 0):
            problems.append(f"{key} is {config[key]}, must be a positive whole number")
    if problems:
        raise InputError("; ".join(problems))
    if out.resolve() == source.resolve():
        raise InputError(f"in and out are both {out}; write to another file")
    if out.is_dir():
        raise PathInUse(f"out={out} is a folder, give the name of a file")
    there = [path for path in (out, out.with_suffix(".json")) if path.exists()]
    if config.format != "safetensors":
        there = [path for path in there if path == out]
    if there and not config.overwrite:
        raise PathInUse(f"{there[0]} exists already; choose another out=, or overwrite=true to replace it")


def apply_hints(weights: Weights, tokenizer: Weights | None, config: DictConfig, source: Path) -> Weights:
    """Options that still matter once the kind is known; refuses those that say nothing.

    A tokenizer fits every resolution; a generator's is part of it.
    """
    useless = ["l2_norm"] if weights.kind == "gpt" and tokenizer is None else []
    if weights.kind == "tokenizer":
        useless = ["tokenizer_ckpt", "downsample_factor", "num_heads"]
    given = [key for key in useless if config[key] is not None]
    if given:
        raise InputError(f"{source} holds a {weights.kind}, for which {', '.join(given)} means nothing; leave it out")
    net = dict(weights.net)
    if weights.kind == "tokenizer":
        net["image_size"] = config.image_size or net["image_size"]
        if net["image_size"] % downsample_factor(net):
            raise InputError(
                f"image_size is {net['image_size']}, {source} needs a multiple of {downsample_factor(net)}"
            )
        said = net["quantizer"].get("l2_norm", True)
        if config.l2_norm not in (None, said):
            if not config.force:
                raise InputError(
                    f"l2_norm is {config.l2_norm}, the config in {source} says {said}; leave it out, or give "
                    "force=true if the file is wrong"
                )
            net["quantizer"] = net["quantizer"] | {"l2_norm": config.l2_norm}
        return replace(weights, config=weights.config | {"task": weights.config["task"] | {"net": net}})
    if config.num_heads not in (None, net["num_heads"]):
        raise InputError(f"num_heads is {config.num_heads}, {source} says {net['num_heads']}; leave it out")
    carried = weights.tokenizer_config if tokenizer is None else tokenizer.net
    factor = config.downsample_factor or (downsample_factor(carried) if carried else None)
    if carried and factor != downsample_factor(carried):
        raise InputError(
            f"downsample_factor is {factor}, the tokenizer inside {source} has {downsample_factor(carried)}; "
            "leave it out"
        )
    side, said = net["code_shape"][0][0], weights.config.get("image_size")
    if not carried and said:
        if factor not in (None, said // side):
            raise InputError(
                f"downsample_factor is {factor}, {source} was trained on {side} x {side} codes of images of {said} px; "
                "leave it out"
            )
        factor = said // side
    if config.image_size is not None and factor is not None and config.image_size != side * factor:
        raise InputError(
            f"image_size is {config.image_size}, {source} writes {side} x {side} codes of {factor} px, which is "
            f"{side * factor}; a generator's resolution is part of it"
        )
    return weights


main = hydra_main("convert")(run)

if __name__ == "__main__":
    main()
