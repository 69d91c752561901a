"""``smalto extract``: image shards through a tokenizer to code shards, continued after a kill."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from smalto import __version__
from smalto.data.annotations import check_range
from smalto.data.code_writer import CodeWriter
from smalto.data.codes import code_dtype
from smalto.data.crops import CROPS, Crops, codes_summary, crop_names
from smalto.data.npy_export import export_npy
from smalto.data.npy_import import import_codes
from smalto.data.output import OutputFolder
from smalto.data.ranks import Ranks
from smalto.data.reader import ImageReader
from smalto.data.shards import CODES, IMAGES, META, read_meta
from smalto.data.text_blocks import text_dim
from smalto.data.transforms import to_float
from smalto.errors import InputError
from smalto.nn.hardware import has_fast_bf16
from smalto.nn.tf32 import tf32_allowed
from smalto.runtime import hydra_main, record_summary, wanted_device
from smalto.tasks.checkpoint import load_tokenizer
from smalto.tokenizers.precision import code_agreement, encode, use_bf16
from smalto.types import ReadyTokenizer

log = logging.getLogger(__name__)

AGREEMENT_IMAGES = 16
"""On which precision=bf16 is compared with fp32."""


def run(config: DictConfig) -> dict[str, Any]:
    """Extract or import what ``config`` (conf/extract.yaml) asks for; the summary of ``extract_codes``."""
    if config.to_npy is not None and config.from_npy is None and (Path(config.out) / META).exists():
        return _export(config, {"out": config.out, "status": "reused"})  # needs no tokenizer
    tokenizer = load_tokenizer(config.tokenizer_ckpt, image_size=config.image_size, verify=config.verify)
    if config.from_npy is None:
        return _export(config, _extract(config, tokenizer))
    given: Any = OmegaConf.to_container(config.from_npy) if OmegaConf.is_dict(config.from_npy) else config.from_npy
    return import_codes(
        tokenizer,
        given if isinstance(given, dict) else {"train": given},
        out=config.out,
        block_size=config.block_size,
        shard_size=config.shard_size,
        overwrite=config.overwrite,
    )


def _export(config: DictConfig, summary: dict[str, Any]) -> dict[str, Any]:
    if config.to_npy is not None and Ranks().first:
        summary["npy"] = [str(folder) for folder in export_npy(config.out, config.to_npy)]
        log.info("the same codes in the authors' layout: %s", ", ".join(summary["npy"]))
    if Ranks().first:
        record_summary(config, "extract", summary)
    return summary


def _extract(config: DictConfig, tokenizer: ReadyTokenizer) -> dict[str, Any]:
    return extract_codes(
        tokenizer,
        data=config.data.path,
        out=config.out,
        text=config.text,
        crops=config.crops,
        crop_range=config.crop_range,
        batch_size=config.batch_size,
        precision=config.precision,
        block_size=config.block_size,
        shard_size=config.shard_size,
        workers=config.workers,
        device=config.device,
        overwrite=config.overwrite,
    )


def extract_codes(
    tokenizer: ReadyTokenizer,
    *,
    data: str | Path,
    out: str | Path,
    crops: Literal["ten", "center_flip", "center"],
    crop_range: Sequence[float] | None,
    batch_size: int,
    block_size: int,
    shard_size: int,
    workers: int,
    device: str,
    overwrite: bool,
    text: str | Path | None = None,
    precision: str = "fp32",
) -> dict[str, Any]:
    """Encode every image of the shards in ``data``, train and val, into the folder ``out``.

    The codes do not depend on ``workers``, on whether the job was interrupted, nor on how many processes share it:
    started by ``torchrun``, each takes whole blocks. (A network's arithmetic may depend on its number of threads and on
    the device in the last bit; give all processes the same.)

    Args:
        tokenizer: whose codes.
        data: folder of image shards.
        out: folder of the code shards.
        crops: ``ten`` (four corners and centre, and the same mirrored), ``center_flip``, or ``center``.
        crop_range: an image is scaled to ``int(size * range)`` before cropping to the tokenizer's size;
            several ranges store all crops of each. None: 1.05 for ten crops, else 1, as in LlamaGen
            (which used 1.05 and 1.1).
        batch_size: crops in a forward pass.
        block_size: images in a block, the unit of resuming and of memory mapping.
        shard_size: images in a shard, rounded up to whole blocks.
        workers: processes that decode and crop; 0: this one.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda``, ...
        overwrite: remove what an earlier job left in ``out``.
        text: folder of text features that go with the codes: float (tokens, width) in ``SPLIT/KEY.npy``, KEY being the
            number in the names of the image's shard members; stored in half precision. None: no text.
        precision: of the encoder's convolutions: ``fp32``, ``bf16``, or ``auto`` (bf16 where the device is faster at
            it). With bf16 some codes change; the share that does not, on the first images, is logged and kept in
            meta.json as ``code_agreement``.

    Returns:
        ``out``, ``status`` (``written`` or ``reused``), ``num_train``, ``num_val``, ``crops``, and with bf16
        ``code_agreement``; the counts are 0 in ranks other than the first.

    Raises:
        ValueError: settings outside their range, or a tokenizer that does not do as it says.
        FileNotFoundError: no image shards in ``data``.
        FileExistsError: ``out`` is in use or holds something else.
        OSError: disk full or read-only.
    """
    default_ranges = [1.05] if crops == "ten" else [1.0]
    ranges = default_ranges if crop_range is None else [float(r) for r in crop_range]
    size = tokenizer.image_size
    _check(crops, ranges, size, batch_size, block_size, shard_size, workers)
    place = wanted_device(f"cuda:{Ranks().local_rank}" if device == "auto" and torch.cuda.is_available() else device)
    bf16 = use_bf16(precision, place)
    code_shape = [list(grid) for grid in tokenizer.code_shape]
    dtype = code_dtype(tokenizer.codebook_size).__name__
    meta = read_meta(data, IMAGES)
    shard_size = -(-shard_size // block_size) * block_size
    names = crop_names(crops, ranges)
    described = {
        "codebook_size": tokenizer.codebook_size,
        "code_shape": code_shape,
        "crops": names,
        "crop_range": ranges,
        "image_size": size,
    }
    images_sha256 = hashlib.sha256((Path(data) / META).read_bytes()).hexdigest()
    settings = {
        **described,
        "tokenizer": tokenizer.fingerprint,
        "images": images_sha256,
        "block_size": block_size,
        "shard_size": shard_size,
        **({} if text is None else {"text": str(text)}),
        **({"precision": "bf16"} if bf16 else {}),
    }
    ranks = Ranks()
    folder = OutputFolder(
        out,
        format=CODES,
        settings=settings,
        command="smalto extract",
        overwrite=overwrite,
        reads=[data, *([text] if text else [])],
        helper=not ranks.first,
    )
    with ranks, _opened_by_the_first(folder, ranks) as finished:
        if finished:
            return codes_summary(folder, "reused", names)
        readers = {split: ImageReader(data, meta, split) for split in meta["splits"]}
        if meta["num_classes"] is not None:
            for split, reader in readers.items():
                check_range(reader.labels, meta["num_classes"], f"{split} in {data}")
        net = tokenizer.tokenizer.to(place)
        described |= _agreement(net, readers, size, ranges, CROPS[crops], place) if bf16 else {}
        _by_the_first(ranks, folder.begin)
        writer = CodeWriter(
            folder=folder,
            ranks=ranks,
            readers=readers,
            text=None if text is None else Path(text),
            encode=partial(encode, net, precision="bf16" if bf16 else "fp32"),
            codebook_size=tokenizer.codebook_size,
            num_tokens=sum(height * width for height, width in code_shape),
            image_size=size,
            crops=crops,
            ranges=ranges,
            batch_size=batch_size,
            block_size=block_size,
            shard_size=shard_size,
            workers=workers,
            device=place,
        )
        splits = writer.write()
        if ranks.first:
            folder.finish(
                {
                    "splits": splits,
                    "num_classes": meta["num_classes"],
                    "classes": meta["classes"],
                    **described,
                    "tokenizer": {"path": str(tokenizer.path), "fingerprint": tokenizer.fingerprint},
                    "images": {"path": str(data), "sha256": images_sha256},
                    "text": None if text is None else {"path": str(text), "dim": text_dim(folder.path, splits)},
                    "dtype": dtype,
                    "tf32": tf32_allowed(),
                    "smalto_version": __version__,
                }
            )
        found = {"code_agreement": described["code_agreement"]} if bf16 else {}
        return codes_summary(folder, "written", names) | found


def _agreement(
    net: Any,
    readers: Mapping[str, ImageReader],
    size: int,
    ranges: list[float],
    names: Sequence[str],
    place: torch.device,
) -> dict[str, Any]:
    """What bf16 does to the codes of the first images."""
    reader = max(readers.values(), key=len)
    first = [np.array([number]) for number in range(min(AGREEMENT_IMAGES, len(reader)))]
    crops = Crops(reader, first, size, ranges, names)
    shares = [code_agreement(net, to_float(crops[number].to(place))) for number in range(len(crops))]
    share = sum(shares) / max(len(shares), 1)
    log.info("precision=bf16: %.2f %% of the codes of %d images are those of fp32", 100 * share, len(shares))
    if not has_fast_bf16(place):
        log.warning("this device has no bf16 units: precision=fp32 is faster here, and exact")
    return {"precision": "bf16", "code_agreement": share, "code_agreement_images": len(shares)}


@contextmanager
def _opened_by_the_first(folder: OutputFolder, ranks: Ranks) -> Iterator[bool]:
    """Whether the folder is finished already; if the first rank cannot open it, no rank goes on."""
    with ExitStack() as stack:
        _by_the_first(ranks, lambda: stack.enter_context(folder))
        yield ranks.share(folder.finished is not None)


def _by_the_first(ranks: Ranks, action: Callable[[], object]) -> None:
    """What the first rank does for all (nothing, in others); if it cannot, no rank goes on."""
    failure: Exception | None = None
    try:
        action()
    except (OSError, ValueError) as error:
        failure = error
    problem = ranks.share(failure and str(failure))
    if failure is not None:
        raise failure
    if problem:
        raise InputError(f"the first process stopped: {problem}")


def _check(
    crops: str,
    ranges: list[float],
    size: int,
    batch_size: int,
    block_size: int,
    shard_size: int,
    workers: int,
) -> None:
    problems = []
    if crops not in CROPS:
        problems.append(f"crops is {crops!r}, must be {', '.join(CROPS)}")
    if not ranges or len(set(ranges)) < len(ranges) or min(ranges) < 1:
        problems.append(f"crop_range is {ranges}, must be a list of different numbers of at least 1")
    elif crops == "ten" and any(int(size * r) == size for r in ranges):
        problems.append(
            f"crop_range is {ranges}: at image_size={size} that leaves no margin and all five crops "
            "are the same; "
            f"use at least {1 + 1 / size:.3g}, or crops=center_flip"
        )
    if min(batch_size, block_size, shard_size) < 1:
        problems.append(
            f"batch_size, block_size, shard_size are {batch_size}, {block_size}, {shard_size}, must be at least 1"
        )
    if workers < 0:
        problems.append(f"workers is {workers}, must be at least 0 (0: no extra process)")
    if problems:
        raise InputError("extract: " + "; ".join(problems))


@hydra_main("extract")
def main(config: DictConfig) -> None:
    """Command line."""
    run(config)
