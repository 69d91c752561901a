"""All picture files below a folder: what is taken, what is left out and why."""

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from smalto.data.annotations import has_held_out, split_word, words_of_splits
from smalto.data.shards import IMAGE_SUFFIXES
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

SYSTEM = {"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}
"""Names that systems leave among files, in lower case; names that begin with a dot count as hidden."""


@dataclass
class Found:
    """What lies below a folder.

    Args:
        files: pictures as the parts of their paths, sorted.
        folders: all that were looked into, in the same form.
        skipped: what was left out, counted by kind.
    """

    files: list[tuple[str, ...]] = field(default_factory=list)
    folders: list[tuple[str, ...]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def empty(self, depth: int) -> list[str]:
        """Folders ``depth`` below the top without a picture in or below them."""
        full = {file[:depth] for file in self.files}
        return sorted("/".join(f) for f in self.folders if len(f) == depth and f not in full)


def find_pictures(root: Path) -> Found:
    """The picture files below ``root``, by their suffixes.

    Links are followed wherever they lead: who can place them in a folder may place files there as well. A folder is
    read once, also when several links lead to it, so links in a circle end.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    if not root.is_dir():
        raise MissingFile(f"no folder {root}; set source.path to the folder with the images")
    found = Found()
    known = {_identity(folder) for folder in (root.resolve(), *root.resolve().parents)}
    links = _walk(root, (), found, known)
    while links:
        prefix = links.pop(0)
        folder = root.joinpath(*prefix)
        if _identity(folder) in known:
            found.skipped[_AGAIN] += 1
        else:
            known.add(_identity(folder))
            links = sorted([*links, *_walk(folder, prefix, found, known)])
    if not found.files:
        raise MissingFile(
            f"no images under {root}; expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}; "
            f"{told(found.skipped)}"
        )
    found.files.sort()
    return found


def folders_are_splits(path: Path, files: Sequence[tuple[str, ...]], layout: str) -> bool:
    """Whether the top folders of ``files`` are splits rather than classes.

    Raises:
        ValueError: it cannot be told: splits beside other folders or files, or no training among them.
    """
    tops = sorted({parts[0] for parts in files if len(parts) > 1})
    splits = {top: split_word(top) for top in tops if split_word(top)}
    if layout == "classes":
        return False
    if layout == "auto" and not splits:
        _refuse_hidden_splits(path, files, tops)
        return False
    others = [f"the folder {top}" for top in tops if top not in splits] + [p[0] for p in files if len(p) == 1]
    if layout == "auto" and "train" not in splits.values() and others:
        return False
    if layout == "auto":
        _refuse_deeper_splits(path, files)
    told_apart = (
        ("source.layout=splits, or " if layout == "auto" else "")
        + "source.layout=classes if all of them are classes, or call splits train, val, test, and move away what is "
        "neither"
    )
    if others:
        raise InputError(
            f"{path} has {', '.join(splits) or 'no split'} and beside it {', '.join(others[:5])}"
            f"{', ...' if len(others) > 5 else ''}: splits and something else; set {told_apart}"
        )
    if layout == "auto" and "train" not in splits.values():
        raise InputError(
            f"{path} has {', '.join(splits)} and no folder for training; set source.path to one of them, or "
            f"{told_apart}"
        )
    return True


def _refuse_hidden_splits(path: Path, files: Sequence[tuple[str, ...]], tops: Sequence[str]) -> None:
    """Refuse splits under names or in places where they would be taken for classes, or for nothing.

    Raises:
        ValueError: all top folders hold words for splits (``train2017``, ``test_set``), or ``train`` and ``val`` lie
            deeper.
    """
    words = [words_of_splits(top) for top in tops]
    if words and all(words) and has_held_out(word for found in words for word in found):
        raise InputError(
            f"{path} has {', '.join(tops[:5])}{', ...' if len(tops) > 5 else ''}: splits by the words in them; call "
            "them train, val, test, or set source.layout=classes if they are classes"
        )
    _refuse_deeper_splits(path, files)


def _refuse_deeper_splits(path: Path, files: Sequence[tuple[str, ...]]) -> None:
    below: dict[tuple[str, ...], set[str]] = {}
    for parts in files:
        for depth in range(1, len(parts) - 1):
            if split_word(parts[depth]):
                below.setdefault(parts[:depth], set()).add(parts[depth])
    deeper = sorted(parent for parent, names in below.items() if has_held_out(map(split_word, names)))
    if deeper:
        more = f", and below {len(deeper) - 1} more folders" if len(deeper) > 1 else ""
        raise InputError(
            f"{path} has splits below {'/'.join(deeper[0])} ({', '.join(sorted(below[deeper[0]]))}){more}: set "
            "source.path to the folder that holds train and val, name each file's split in a table (source.metadata), "
            "or set source.layout=classes to take all as one"
        )


def compare_classes(path: Path, classes: Mapping[str, set[str]]) -> None:
    """Look whether folders in the splits are the same classes.

    Args:
        path: for messages.
        classes: of each split, ``train``, ``val`` or ``test``.

    Raises:
        ValueError: what is held out lies in one folder, and none is called so in training: it is no class.
    """
    train = classes.get("train", set())
    for split in ("val", "test"):
        extra = sorted(classes.get(split, set()) - train)
        if len(train) > 1 and len(extra) == 1 and extra == sorted(classes[split]):
            raise InputError(
                f"{path} has all images for {split} in one folder, {extra[0]}, and no class for training is called so; "
                f"give {split} a folder for each class, or leave it out; or name each file's label in a table "
                "(source.metadata)"
            )
        if extra and train:
            log.warning("%s: classes of %s that training lacks: %s", path, split, ", ".join(extra[:5]))


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether a path leads through a hidden or system name."""
    return any((part.startswith(".") and part not in (".", "..")) or part.lower() in SYSTEM for part in parts)


def kind(name: str) -> str:
    """By what a file that is no picture is counted."""
    return Path(name).suffix.lower() or "without suffix"


def told(skipped: Mapping[str, int]) -> str:
    """``3 skipped (2 .txt, 1 hidden)``."""
    parts = ", ".join(f"{count} {name}" for name, count in sorted(skipped.items()))
    return f"{sum(skipped.values())} skipped" + (f" ({parts})" if parts else "")


def _walk(top: Path, prefix: tuple[str, ...], found: Found, known: set[tuple[int, int]]) -> list[tuple[str, ...]]:
    """Enter what is below ``top``; the links to folders that were met, sorted."""
    links = []
    todo = [(top, prefix)]
    while todo:
        folder, parts = todo.pop()
        if parts:
            found.folders.append(parts)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            found.skipped["unreadable folders"] += 1
            continue
        for entry in entries:
            place = (*parts, entry.name)
            if is_hidden((entry.name,)):
                found.skipped["hidden or system"] += 1
            elif not _is_folder(entry):
                if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
                    found.files.append(place)
                else:
                    found.skipped[kind(entry.name)] += 1
            elif entry.is_symlink():
                links.append(place)
            elif _identity(Path(entry.path)) in known:  # below a link that leads above a folder
                found.skipped[_AGAIN] += 1
            else:
                known.add(_identity(Path(entry.path)))
                todo.append((Path(entry.path), place))
    return sorted(links)


_AGAIN = "folders that are read already"


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino
