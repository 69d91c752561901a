"""``smalto extract``: image shards through a tokenizer to code shards, continued after a kill."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from omegaconf import DictConfig

from smalto import __version__
from smalto.data.code_writer import CROPS, CodeWriter, crop_names
from smalto.data.codes import code_dtype
from smalto.data.output import OutputFolder
from smalto.data.progress import progress
from smalto.data.reader import ImageReader
from smalto.data.shards import CODES, IMAGES, META, read_meta
from smalto.runtime import hydra_main
from smalto.tasks.checkpoint import load_tokenizer
from smalto.types import CodeShape

log = logging.getLogger(__name__)


class ReadyTokenizer(Protocol):
    """What extraction needs to know of a tokenizer; ``smalto.tasks.checkpoint.LoadedTokenizer`` is one."""

    @property
    def tokenizer(self) -> Any:
        """A module in eval mode with ``encode``: float (B, 3, S, S) in [-1, 1] to int64 (B, L)."""

    @property
    def codebook_size(self) -> int:
        """All codes are below."""

    @property
    def code_shape(self) -> CodeShape:
        """Grids of codes of an image."""

    @property
    def image_size(self) -> int:
        """Side S of the images it encodes."""

    @property
    def fingerprint(self) -> str:
        """Of the weights."""

    @property
    def path(self) -> str | Path:
        """Of the checkpoint."""


def run(config: DictConfig) -> dict[str, Any]:
    """Extract what ``config`` (conf/extract.yaml) asks for; the summary of ``extract_codes``."""
    return extract_codes(
        load_tokenizer(config.tokenizer_ckpt, image_size=config.image_size),
        data=config.data.path,
        out=config.out,
        crops=config.crops,
        crop_range=config.crop_range,
        batch_size=config.batch_size,
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
) -> dict[str, Any]:
    """Encode every image of the shards in ``data``, train and val, into the folder ``out``.

    The codes do not depend on ``workers``, nor on whether the job was interrupted.

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

    Returns:
        ``out``, ``status`` (``written`` or ``reused``), ``num_train``, ``num_val``, ``crops``.

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
    code_shape = [list(grid) for grid in tokenizer.code_shape]
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
    }
    folder = OutputFolder(out, format=CODES, settings=settings, command="smalto extract", overwrite=overwrite)
    with folder:
        if folder.finished is None:
            place = torch.device(_device(device))
            writer = CodeWriter(
                folder=folder,
                encode=tokenizer.tokenizer.to(place).encode,
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
            readers = {split: ImageReader(data, meta, split) for split in meta["splits"]}
            total = sum(len(reader) for reader in readers.values())
            done = sum(writer.done(split, len(reader)) for split, reader in readers.items())
            with progress("extract", total=total, done=done) as advance:
                splits = {split: writer.write(split, reader, advance) for split, reader in readers.items()}
            folder.finish(
                {
                    "splits": splits,
                    "num_classes": meta["num_classes"],
                    "classes": meta["classes"],
                    **described,
                    "tokenizer": {"path": str(tokenizer.path), "fingerprint": tokenizer.fingerprint},
                    "images": {"path": str(data), "sha256": images_sha256},
                    "dtype": code_dtype(tokenizer.codebook_size).__name__,
                    "smalto_version": __version__,
                }
            )
            status = "written"
        else:
            status = "reused"
    counts = {split: entry["num_images"] for split, entry in (folder.finished or {})["splits"].items()}
    log.info("%s: %s, %s images, %d crops each", out, status, counts, len(names))
    return {
        "out": str(out),
        "status": status,
        "num_train": counts.get("train", 0),
        "num_val": counts.get("val", 0),
        "crops": names,
    }


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


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
        raise ValueError("extract: " + "; ".join(problems))


@hydra_main("extract")
def main(config: DictConfig) -> None:
    """Command line."""
    run(config)
