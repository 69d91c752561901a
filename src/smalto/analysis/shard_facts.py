"""What is in a set of image or code shards, in words and numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from smalto.data.annotations import check_range
from smalto.data.codes import CodeReader
from smalto.data.reader import ImageReader
from smalto.metrics.codebook import unigram_entropy

Facts = dict[str, Any]
"""Lines of a table: name to value; a dict inside is a table of its own."""

MOST_COUNTED = 2**22
"""Codes whose frequencies are counted one by one."""


def image_facts(path: Path, meta: dict[str, Any]) -> Facts:
    """From meta.json alone."""
    size = meta["image_size"]
    return {
        "what": "image shards",
        **split_facts(meta),
        "classes": _classes(meta),
        "captions": "yes" if meta.get("captions") else "no",
        "image size": "several" if size is None else f"{size[0]}x{size[1]}",
        "encoding": meta["encoding"],
        "resize": json.dumps(meta.get("resize")),
        "rejected": meta.get("rejected", 0),
        "command": meta.get("command", "unknown"),
    }


def code_facts(path: Path, meta: dict[str, Any]) -> Facts:
    """From meta.json alone."""
    text = meta.get("text")
    return {
        "what": "code shards",
        **split_facts(meta),
        "classes": _classes(meta),
        "grid": " + ".join(f"{h}x{w}" for h, w in meta["code_shape"]),
        "codebook": f"{meta['codebook_size']} codes, stored as {meta['dtype']}",
        "crops": f"{len(meta['crops'])} of each image, ranges {meta.get('crop_range')}",
        "text": f"features of width {text['dim']}" if text else "no",
        "tokenizer": f"{meta['tokenizer']['path']}, weights {meta['tokenizer']['fingerprint']}",
        "images": (meta.get("images") or {}).get("path", "unknown"),
    }


def split_facts(meta: dict[str, Any]) -> Facts:
    """Images, shards and bytes of each split."""
    return {
        name: f"{split['num_images']:,} images, {len(split['shards'])} shards, "
        f"{sum(shard['bytes'] for shard in split['shards']) / 2**20:,.1f} MiB"
        for name, split in meta["splits"].items()
    }


def label_statistics(path: Path, meta: dict[str, Any]) -> Facts:
    """How many images the classes have."""
    if meta["num_classes"] is None:
        return {}
    labels = np.concatenate([ImageReader(path, meta, split).labels for split in meta["splits"]])
    return _class_sizes(labels, meta)


def code_statistics(path: Path, meta: dict[str, Any]) -> Facts:
    """How the codes of the first crop are used, and how many images the classes have."""
    if meta["codebook_size"] > MOST_COUNTED:
        return {"codebook usage": f"not counted: more than {MOST_COUNTED:,} codes"}
    counts, labels = np.zeros(meta["codebook_size"], np.int64), []
    for split in meta["splits"]:
        reader = CodeReader(path, meta, split)
        labels.append(reader.labels)
        for start in range(0, len(reader), 4096):
            indices = np.arange(start, min(start + 4096, len(reader)))
            codes = reader.gather(indices, np.zeros(len(indices), np.int64), distinct=True)
            counts += np.bincount(codes.ravel(), minlength=len(counts))
    entropy = float(unigram_entropy(torch.from_numpy(counts)))
    ranked = np.argsort(-counts, kind="stable")
    total = counts.sum()
    shares = np.cumsum(counts[ranked]) / total
    return {
        **(_class_sizes(np.concatenate(labels), meta) if meta["num_classes"] is not None else {}),
        "codebook usage": f"{100 * (counts > 0).mean():.1f} % of the codes occur (first crop)",
        "entropy": f"{entropy:.3f} nats of {np.log(len(counts)):.3f}, perplexity {np.exp(entropy):,.0f}",
        "most frequent": ", ".join(f"{c}: {100 * counts[c] / total:.2f} %" for c in ranked[:5]),
        "histogram": {
            f"the {max(1, round(part * len(counts)))} most frequent": f"{100 * share:.1f} % of all tokens"
            for part in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75)
            for share in [shares[max(1, round(part * len(counts))) - 1]]
        },
    }


def _class_sizes(labels: np.ndarray, meta: dict[str, Any]) -> Facts:
    check_range(labels[labels >= 0], meta["num_classes"], "the set")
    sizes = np.bincount(labels[labels >= 0], minlength=meta["num_classes"])
    return {"images per class": f"{sizes.min()} to {sizes.max()}, median {np.median(sizes):g}"}


def _classes(meta: dict[str, Any]) -> str:
    if meta["num_classes"] is None:
        return "no labels"
    names = meta["classes"][:5]
    return f"{meta['num_classes']}" + (
        f": {', '.join(names)}{', ...' if len(meta['classes']) > 5 else ''}" if names else ""
    )
