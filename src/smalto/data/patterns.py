"""Many shards in one word: braces, wildcards, and folders that ``smalto prepare`` did not write."""

import glob
import re
from pathlib import Path
from typing import Any

from smalto.data.shards import META
from smalto.errors import MissingFile


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
    paths: list[Path] = []
    for part in expand_braces(str(pattern)):
        found = sorted(map(Path, glob.glob(part)))
        if not found:
            raise MissingFile(f"{part} matches no file (from {pattern}); check the path")
        paths += found
    return paths


def expand_braces(pattern: str) -> list[str]:
    """All texts that ``a-{000..009}.tar`` or ``{train,val}-x`` stands for, in order; also of URLs and commands."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if numbers:
        width = len(numbers[1])
        choices = [f"{n:0{width}d}" for n in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        choices = match[1].split(",")
    return [
        text for choice in choices for text in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def scan_foreign(pattern: str | Path) -> dict[str, Any]:
    """What stands in for meta.json with image shards that ``smalto prepare`` did not write.

    Shards whose names begin with ``val`` or ``test`` validate, all others train.

    Raises:
        FileNotFoundError: nothing matches.
    """
    splits: dict[str, Any] = {split: {"shards": []} for split in ("train", "val")}
    for path in expand_paths(pattern):
        split = "val" if path.name.lower().startswith(("val", "test")) else "train"
        splits[split]["shards"].append({"name": str(path.absolute())})
    return {"splits": splits, "num_classes": None, "classes": [], "image_size": None, "encoding": None}


def is_foreign(path: str | Path) -> bool:
    """Whether ``path`` is a pattern, a tar file, or a folder of tar files that ``smalto prepare`` did not make."""
    path = Path(path)
    if path.is_dir():
        ours = (path / META).exists() or (path / "plan.json").exists()
        return not ours and any(path.glob("*.tar"))
    return path.is_file() or any(mark in str(path) for mark in "*?[{")
