"""What tables, file names and members of tars say of a record: its label, caption and split, compared as columns."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smalto.data.foreign import one_line
from smalto.errors import InputError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
MAX_LABEL = 2**31 - 1  # code shards hold labels as int32

_SPLIT_WORD = re.compile(rf"(?<![a-z])(?:trainval|{'|'.join(SPLITS)})(?:set)?(?![a-z])")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NO_NUMBER = {"nan", "inf", "+inf", "-inf", "infinity", "-infinity", "null", "none", "na", "n/a", "<na>"}
_NO_NAME = re.compile("[\0-\b\ud800-\udfff\ufeff]")
_LEADING = re.compile(r"(train|val|test|dev|eval)(ing|id|idation|uation|set|val)?(?![a-z])", re.IGNORECASE)


def split_word(value: Any) -> str | None:
    """``train``, ``val`` or ``test`` for any word that is used for it, in any case; None for other words."""
    return SPLITS.get(str(value).strip().lower())


def leading_split(path: Path) -> str | None:
    """The split a file name begins with, as a word of its own (``train-000.tar``, not ``valley.tar``), or None."""
    found = _LEADING.match(path.name)
    return split_word({"dev": "val", "eval": "val"}.get(found[1].lower(), found[1])) if found else None


def words_of_splits(name: str) -> set[str]:
    """Splits that a name speaks of, with a word of its own: ``imagenet1k-train-00.tar``, ``val2017``, ``test_set``."""
    words = (word.removesuffix("set") for word in _SPLIT_WORD.findall(name.lower()))
    return {SPLITS["train" if word == "trainval" else word] for word in words}


def has_held_out(splits: Iterable[str | None]) -> bool:
    """Whether there is training among them, and something to be kept from it."""
    found = set(splits)
    return "train" in found and bool(found & {"val", "test"})


def file_splits(paths: Sequence[Path]) -> list[str | None]:
    """Split of each of several files: the word a name begins with; without such words, what else tells them apart.

    That is the folder a file is in (``train/0000.parquet``), or a word in its name (``imagenet1k-train-00.tar``), if
    these make out both training and something held out: it must not be trained on.
    """
    leading = [leading_split(path) for path in paths]
    if any(leading):
        return leading
    for found in ([split_word(p.parent.name) for p in paths], [_only(words_of_splits(p.name)) for p in paths]):
        if has_held_out(found):
            return found
    return leading


def _only(words: set[str]) -> str | None:
    return next(iter(words)) if len(words) == 1 else None


def read_labels(values: Sequence[Any], place: Callable[[int], str]) -> list[int | str | None]:
    """A column of labels, decided as a whole: numbers if all of it are whole numbers (also ``3.0``), else names.

    Args:
        values: of each record, as a table or a file has them; None and empty text are no label.
        place: says where value number i stands.

    Raises:
        ValueError: a fraction, NaN or a word for it among numbers, or no single value. (Numbers that are no class, such
            as -1, may stand in a split that nobody takes: ``check_labels`` looks at those that are taken.)
    """
    read = [_read(value, i, place) for i, value in enumerate(values)]
    names = any(kind is str for kind, _ in read)
    for i, (kind, _) in enumerate(read):
        if kind is float and not (names and isinstance(values[i], str)):
            raise InputError(
                f"{place(i)}: the label {_shown(values[i])} is no class; labels are whole numbers from 0, or names, or "
                "left empty"
            )
    if names:
        found: list[int | str | None] = [None if v is None else str(v).strip() for v in map(_blank, values)]
        for i, name in enumerate(found):
            if isinstance(name, str) and _NO_NAME.search(name):
                raise InputError(
                    f"{place(i)}: the label {_shown(name)} holds bytes that are no text; write it as a number or a name"
                )
        return found
    return [number for _, number in read]


def _blank(value: Any) -> Any:
    return None if value is None or (isinstance(value, str) and not value.strip()) else value


def _read(value: Any, i: int, place: Callable[[int], str]) -> tuple[type | None, int | None]:
    """Kind of a value (None: no label, int, str: a name, float: a number that is no class), and the number."""
    value = _blank(value)
    if value is None:
        return None, None
    if isinstance(value, bool | int):
        return int, int(value)
    if not isinstance(value, str | float):
        raise InputError(f"{place(i)}: the label is {_shown(value)}; it must be one number or one name")
    text = str(value).strip()
    if text.lower() in _NO_NUMBER:
        return float, None
    if not _NUMBER.fullmatch(text):
        return str, None
    number = float(text)
    if not math.isfinite(number) or not number.is_integer():
        return float, None
    return int, int(text) if len(text) < 20 and text.lstrip("+-").isdigit() else int(number)


def read_caption(value: Any, place: Callable[[], str]) -> tuple[str | None, int]:
    """A caption as text, and how many more there were: of a list the first is taken, a number becomes text.

    Raises:
        ValueError: anything else, or text that cannot be stored.
    """
    more = 0
    if isinstance(value, list | tuple) and value and all(isinstance(v, str) for v in value):
        value, more = value[0], len(value) - 1
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None or value == "":
        return None, more
    if not isinstance(value, str):
        raise InputError(f"{place()}: the caption is {_shown(value)}; it must be one sentence, or a list of them")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{place()}: the caption is not valid Unicode text") from None
    return value, more


def given_names(classes: Iterable[Any]) -> list[str]:
    """``source.classes`` as names.

    Raises:
        ValueError: null, true or false, which YAML makes of words without quotes.
    """
    if isinstance(classes, str | bytes | Mapping):
        raise InputError(f"source.classes is {_shown(classes)}; it must be a list of names in the order of the labels")
    names = list(classes)
    for name in names:
        if name is None or isinstance(name, bool) or not isinstance(name, str | int | float):
            raise InputError(f"source.classes has {name!r}, which is no name; put names in quotes")
    return [str(name) for name in names]


def class_order(names: Iterable[str]) -> list[str]:
    """Names in the order of their labels: sorted, as numbers where all are whole numbers."""
    names = set(names)
    if all(name.isascii() and name.isdigit() for name in names):
        return sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))
    return sorted(names)


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Number of each name; one that several classes bear is left out: it says nothing."""
    counts = Counter(names)
    return {name: number for number, name in enumerate(names) if counts[name] == 1}


def class_number(label: int | str | None, numbers: Mapping[str, int], where: object) -> int | None:
    """Label as a number; names are looked up in ``numbers``."""
    if not isinstance(label, str):
        if label is not None and not 0 <= label <= MAX_LABEL:
            raise InputError(f"the label is {label}; labels count from 0 to {MAX_LABEL}")
        return label
    if label not in numbers:
        raise InputError(
            f"class {label!r} in {where} is not among source.classes ({len(numbers)} names), or several classes are "
            "called so"
        )
    return numbers[label]


def check_labels(
    labels: Sequence[int | str | None], records: Iterable[int], classes: Sequence[str], name: Callable[[int], str]
) -> None:
    """Refuse, before any image is read, labels that no set of classes can have.

    Args:
        labels: of all records.
        records: those that are wanted; of others nothing is asked.
        classes: their names; may be empty.
        name: of a record.

    Raises:
        ValueError: only some records have one, or a number or a name that is no class.
    """
    records = [int(i) for i in records]
    missing = [i for i in records if labels[i] is None]
    if missing and len(missing) < len(records):
        shown = ", ".join(one_line(name(i)) for i in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{len(missing)} of {len(records)} images have no label ({shown}); give all of them one, or none (labels "
            "are not needed to train a tokenizer)"
        )
    numbers = class_numbers(classes)
    unknown = [i for i in records if isinstance(label := labels[i], str) and label not in numbers]
    if unknown:
        shown = ", ".join(sorted({repr(labels[i]) for i in unknown})[:5])
        raise InputError(
            f"{len(unknown)} of {len(records)} images ({one_line(name(unknown[0]))}, ...) are of classes not among "
            f"source.classes, or that several have there: {shown}; correct the list"
        )
    for i in records:
        label = labels[i]
        if not isinstance(label, int):
            continue
        if not 0 <= label <= MAX_LABEL:
            raise InputError(
                f"{one_line(name(i))}: the label is {label}; labels count from 0 to {MAX_LABEL}: leave it empty where "
                "there is no label, or take the images without labels"
            )
        if classes and label >= len(classes):
            raise InputError(
                f"{one_line(name(i))}: a label is {label} but the source names {len(classes)} classes; correct "
                "source.classes"
            )


def check_range(labels: np.ndarray, num_classes: int, where: object) -> None:
    """Refuse stored labels that are outside the classes of their set.

    Raises:
        ValueError: a label below 0, or beyond the last class.
    """
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        raise InputError(
            f"{outside.size} labels of {where} are outside 0 to {num_classes - 1}, the first is {labels[outside[0]]} "
            f"of image {outside[0]}; prepare the images again with labels from 0, or without labels"
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
