"""Many shards in one word: braces, wildcards, and folders that ``smalto prepare`` did not write."""

import glob
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from smalto.data.annotations import file_splits
from smalto.data.shards import META
from smalto.errors import InputError, MissingFile


def expand_paths(pattern: str | Path, suffix: str = ".tar") -> list[Path]:
    """Files meant by a path with braces (``a-{000..009}.tar``, ``{train,val}-*.tar``) and wildcards, sorted.

    A folder means every file ending in ``suffix`` in it. What exists under the very name given is that, so brackets
    and braces in names of real files and folders do no harm.

    Raises:
        FileNotFoundError: a part of the pattern matches no file.
    """
    path = Path(pattern)
    if path.is_dir():
        found = sorted(path.glob(f"*{suffix}"))
        if not found:
            raise MissingFile(f"the folder {path} holds no *{suffix} files; check the path")
        return found
    if path.exists():
        return [path]
    paths: dict[Path, None] = {}  # what several parts match is one file
    for part in expand_braces(str(pattern)):
        found = sorted(map(Path, glob.glob(part)))
        if not found:
            raise MissingFile(f"{part} matches no file (from {pattern}); check the path")
        paths |= dict.fromkeys(found)
    return list(paths)


def expand_braces(pattern: str) -> list[str]:
    """All texts that ``a-{000..009}.tar`` or ``{train,val}-x`` stands for, in order; also of URLs and commands.

    Raises:
        ValueError: too many.
    """
    texts = list(itertools.islice(_expansions(pattern), _MOST + 1))
    if len(texts) > _MOST:
        raise InputError(f"{pattern} stands for more than {_MOST} names; check the numbers in braces")
    return texts


def _expansions(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", match[1])
    choices: Iterable[str] = match[1].split(",")
    if numbers:
        width, first, last = len(numbers[1]), int(numbers[1]), int(numbers[2])
        step = 1 if first <= last else -1  # as shells do
        choices = (f"{n:0{width}d}" for n in range(first, last + step, step))
    for choice in choices:
        yield from _expansions(pattern[: match.start()] + choice + pattern[match.end() :])


_MOST = 10**6


def scan_foreign(pattern: str | Path) -> dict[str, Any]:
    """What stands in for meta.json with image shards that ``smalto prepare`` did not write.

    Shards whose names or folders say that they are for validation or test validate, all others train.

    Raises:
        FileNotFoundError: nothing matches.
    """
    splits: dict[str, Any] = {split: {"shards": []} for split in ("train", "val")}
    paths = expand_paths(pattern)
    for path, word in zip(paths, file_splits(paths), strict=True):
        held_out = word in ("val", "test") or path.name.lower().startswith(("val", "test"))
        split = "val" if held_out else "train"
        splits[split]["shards"].append({"name": str(path.absolute())})
    return {"splits": splits, "num_classes": None, "classes": [], "image_size": None, "encoding": None}


def is_foreign(path: str | Path) -> bool:
    """Whether ``path`` is a pattern, a tar file, or a folder of tar files that ``smalto prepare`` did not make."""
    path = Path(path)
    if path.is_dir():
        ours = (path / META).exists() or (path / "plan.json").exists()
        return not ours and any(path.glob("*.tar"))
    return path.is_file() or any(mark in str(path) for mark in "*?[{")
