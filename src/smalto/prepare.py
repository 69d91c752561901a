"""``smalto prepare``: images from any source to shards with a meta.json, parallel, continued after a kill."""

import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import DictConfig, OmegaConf

from smalto import __version__
from smalto.data.encode import Recipe
from smalto.data.folder_scan import told
from smalto.data.image_writer import ImageWriter
from smalto.data.output import OutputFolder
from smalto.data.output_plan import REJECTED
from smalto.data.pool import available_cpus
from smalto.data.shards import IMAGES
from smalto.data.sources import Source
from smalto.data.splits import listing, plan_splits
from smalto.errors import InputError
from smalto.runtime import build, hydra_main, record_summary

log = logging.getLogger(__name__)

DEFAULT_QUALITY = {"jpg": 95, "png": -1, "webp": 0}  # above, png and webp cost much time for little size

READS = ("path", "images", "labels", "val_images", "val_labels", "metadata")
"""Options of sources that name files and folders."""


def run(config: DictConfig) -> dict[str, Any]:
    """Prepare what ``config`` (conf/prepare.yaml) asks for; the summary of ``prepare_images``."""
    quality = DEFAULT_QUALITY.get(config.encoding, 0) if config.quality is None else config.quality
    description: Any = OmegaConf.to_container(config.source, resolve=True)
    if description.get("layout") == "auto":
        del description["layout"]  # jobs from before there was such an option go on
    summary = prepare_images(
        build(config.source),
        out=config.out,
        recipe=Recipe(config.resize, config.image_size, config.encoding, quality, config.min_side),
        split=config.split,
        val_fraction=config.val_fraction,
        limit=config.limit,
        shuffle=config.shuffle,
        seed=config.seed,
        shard_size=config.shard_size,
        workers=available_cpus() if config.workers is None else config.workers,
        max_rejected=config.max_rejected,
        overwrite=config.overwrite,
        description=description,
        command=shlex.join(["smalto", "prepare", *(a for a in sys.argv[1:] if "=" in a)]),
    )
    record_summary(config, "prepare", summary)
    return summary


def prepare_images(
    source: Source,
    *,
    out: str | Path,
    recipe: Recipe,
    split: Literal["auto", "source", "hash"],
    val_fraction: float,
    limit: int | None,
    shuffle: bool,
    seed: int,
    shard_size: int,
    workers: int,
    max_rejected: int,
    overwrite: bool,
    description: Any,
    command: str,
) -> dict[str, Any]:
    """Write the images of ``source`` as shards into the folder ``out``.

    The content of each shard is decided before the first image is read, so a job that was killed goes on
    with the shard it was at, and the bytes do not depend on ``workers``.

    Args:
        source: the images.
        out: folder of the data set.
        recipe: size and encoding.
        split: ``source`` takes the source's own split, ``hash`` draws one, ``auto`` the first if there
            is one.
        val_fraction: share of validation images when drawn.
        limit: at most this many images, the first of the order; None: all.
        shuffle: mix before sharding.
        seed: of the mixing.
        shard_size: images in a shard.
        workers: processes that decode and encode; 0: this one.
        max_rejected: unreadable images that are left out (and named in rejected.jsonl) before it is an error.
        overwrite: remove what an earlier job left in ``out``.
        description: of the source, for meta.json and to recognise the job.
        command: for meta.json.

    Returns:
        ``out``, ``status`` (``written`` or ``reused``), ``num_train``, ``num_val``, ``rejected``.

    Raises:
        ValueError: settings outside their range, no split in the source, too many rejected images, none left.
        FileExistsError: ``out`` is in use or holds something else.
        OSError: disk full or read-only.
    """
    _check(split, val_fraction, limit, shard_size, workers, max_rejected)
    settings = {
        "source": description,
        **asdict(recipe),
        "split": split,
        "val_fraction": val_fraction,
        "limit": limit,
        "shuffle": shuffle,
        "seed": seed,
        "shard_size": shard_size,
    }
    folder = OutputFolder(
        out,
        format=IMAGES,
        settings=settings,
        command="smalto prepare",
        overwrite=overwrite,
        reads=[value for key, value in description.items() if key in READS and value and "://" not in str(value)],
    )
    with folder:
        if folder.finished is not None:
            return _summary(folder, "reused")
        rng = np.random.default_rng(seed) if shuffle else None
        splits = plan_splits(source, split, val_fraction, limit, rng)
        source.check(np.concatenate(list(splits.values())) if splits else [])
        folder.begin(listing(source, splits))
        writer = ImageWriter(folder=folder, source=source, recipe=recipe, workers=workers, max_rejected=max_rejected)
        writer.write(splits, shard_size)
        folder.finish(
            {
                "splits": writer.meta_splits(splits),
                **writer.describe(list(source.classes)),
                "skipped": _skipped(source, splits, limit),
                "encoding": recipe.encoding,
                "resize": {"mode": recipe.resize, "image_size": recipe.image_size},
                "source": description,
                "command": command,
                "smalto_version": __version__,
            }
        )
        return _summary(folder, "written")


def _skipped(source: Source, splits: dict[str, np.ndarray], limit: int | None) -> dict[str, int]:
    """All that the source has and that is neither taken nor rejected, by kind."""
    considered = len(source) if limit is None else min(limit, len(source))
    more = {
        "images beyond limit": len(source) - considered,
        "images of a split that is not stored": considered - sum(map(len, splits.values())),
    }
    return {**source.skipped, **{kind: count for kind, count in more.items() if count}}


def _summary(folder: OutputFolder, status: str) -> dict[str, Any]:
    meta = folder.finished
    assert meta is not None
    counts = {name: split["num_images"] for name, split in meta["splits"].items()}
    taken = ", ".join(f"{count} {name}" for name, count in counts.items())
    log.info(
        "%s: %s: %d images taken (%s), %d rejected%s, %s",
        folder.path,
        status,
        sum(counts.values()),
        taken,
        meta["rejected"],
        f" (named in {REJECTED})" if meta["rejected"] else "",
        told(meta.get("skipped", {})),
    )
    return {
        "out": str(folder.path),
        "status": status,
        "num_train": counts.get("train", 0),
        "num_val": counts.get("val", 0),
        "rejected": meta["rejected"],
    }


def _check(
    split: str, val_fraction: float, limit: int | None, shard_size: int, workers: int, max_rejected: int
) -> None:
    problems = []
    if split not in ("auto", "source", "hash"):
        problems.append(f"split is {split!r}, must be auto, source or hash")
    if not 0 <= val_fraction < 1:
        problems.append(f"val_fraction is {val_fraction}, must be in [0, 1)")
    if limit is not None and limit < 1:
        problems.append(f"limit is {limit}, must be at least 1, or null for all images")
    if shard_size < 1:
        problems.append(f"shard_size is {shard_size}, must be at least 1 image")
    if workers < 0:
        problems.append(f"workers is {workers}, must be at least 0 (0: no extra process)")
    if max_rejected < 0:
        problems.append(f"max_rejected is {max_rejected}, must be at least 0")
    if problems:
        raise InputError("prepare: " + "; ".join(problems))


@hydra_main("prepare")
def main(config: DictConfig) -> None:
    """Command line."""
    run(config)
