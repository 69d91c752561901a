"""What a meta.json may say: it comes from whoever made the data set, so every value is looked at before it is used."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

IMAGES: Final = "smalto-images"
CODES: Final = "smalto-codes"
_SHARD_NAME = re.compile(r"[^/\\\0]+\.tar")

MOST_CLASSES = 10**7
_SIDE, _WIDTH = 2**16, 2**16
"""Of an image, and of text features."""


def read_json(path: Path) -> Any:
    """What a file says.

    Raises:
        OSError: nothing there, or it is no plain file.
        ValueError: no JSON.
    """
    if path.exists() and not path.is_file():  # a pipe would wait
        raise OSError(f"{path} is no plain file")
    try:
        return json.loads(path.read_text())
    except RecursionError:
        raise ValueError("lists in each other without end") from None


def meta_problems(meta: dict[str, Any]) -> list[str]:
    """What cannot be true in a meta.json of one of our formats, whatever the shards hold; one line each."""
    try:
        problems = [
            f"{key} is {_shown(meta[key])}, it must be {what}"
            for key, (fits, what) in _KINDS.items()
            if key in meta and not fits(meta[key]) and (meta["format"] != IMAGES or key in _NEEDED[IMAGES])
        ]
        shards = [shard for split in meta["splits"].values() for shard in split["shards"]]
        if shards:
            needed = _NEEDED[meta["format"]]
            problems += [f"{key} is missing" for key in needed if key not in meta]
        names = [shard["name"] for shard in shards]
        problems += [f"shard {_shown(name)} is no plain file name" for name in names if not _is_name(name)]
        if problems:
            return problems
        problems += [f"shard {name} is listed twice" for name, count in Counter(names).items() if count > 1]
        for split, entry in meta["splits"].items():
            counts = [shard.get("num_images") for shard in entry["shards"]]
            known = [number for number in (entry.get("num_images"), *counts) if number is not None]
            if not all(_whole(number, 2**60) for number in (*known, *(shard["bytes"] for shard in entry["shards"]))):
                problems.append(f"{_shown(split)} has sizes that are no whole numbers")
            elif None not in [entry.get("num_images"), *counts] and entry["num_images"] != sum(counts):
                problems.append(f"{split} has {entry['num_images']} images, its shards {sum(counts)}")
        return problems
    except (KeyError, TypeError, AttributeError) as error:
        return [f"it lacks what belongs there ({type(error).__name__}: {error})"]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and _SHARD_NAME.fullmatch(name) is not None


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (dict, list)) else repr(value)[:60]


def _whole(value: Any, most: int, least: int = 0) -> bool:
    return type(value) is int and least <= value <= most


def _is_list(value: Any, of: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and length in (None, len(value)) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_side(value: Any) -> bool:
    return _whole(value, _SIDE, 1)


def _is_pair(value: Any) -> bool:
    return _is_list(value, _is_side, 2)


def _has(value: Any, **kinds: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(key in value and fits(value[key]) for key, fits in kinds.items())


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_classes": (lambda v: v is None or _whole(v, MOST_CLASSES, 1), f"a number from 1 to {MOST_CLASSES}, or null"),
    "classes": (lambda v: _is_list(v, _is_text), "a list of names"),
    "image_size": (lambda v: v is None or _is_side(v) or _is_pair(v), f"a size in pixels up to {_SIDE}, or null"),
    "encoding": (lambda v: v is None or _is_text(v), "a name, or null"),
    "codebook_size": (lambda v: _whole(v, 2**32, 1), f"a number from 1 to {2**32}"),
    "code_shape": (lambda v: _is_list(v, _is_pair) and len(v) > 0, "a list of [height, width]"),
    "dtype": (lambda v: v in ("uint16", "uint32"), "uint16 or uint32"),
    "crops": (lambda v: _is_list(v, _is_text) and len(v) > 0, "a list of names"),
    "crop_range": (lambda v: _is_list(v, lambda r: type(r) in (int, float)) and len(v) > 0, "a list of numbers"),
    "tokenizer": (lambda v: _has(v, path=_is_text, fingerprint=_is_text), "a path and a fingerprint"),
    "images": (lambda v: _has(v, path=_is_text), "a path"),
    "text": (lambda v: v is None or _has(v, dim=lambda d: _whole(d, _WIDTH, 1)), "null, or a dim"),
}
"""Of what is used; images that were drawn say more of themselves."""
_NEEDED = {
    IMAGES: ("num_classes", "classes", "image_size", "encoding"),
    CODES: ("num_classes", "classes", "codebook_size", "code_shape", "dtype", "crops", "tokenizer"),
}
