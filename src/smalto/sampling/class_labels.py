"""Classes that a user asks for, by number or by name, and how they are said."""

import json
from collections.abc import Sequence
from typing import Any

from smalto.errors import InputError

_SHOWN = 8


def class_numbers(labels: Any, *, names: Sequence[str], count: int) -> list[int]:
    """Numbers of the classes that are wanted.

    Args:
        labels: numbers or names, one or a list of them; None: all classes.
        names: of the classes in the order of their numbers; may be empty.
        count: of classes that the model knows.

    Raises:
        ValueError: no label, one that is no class, or one that can be read in two ways.
    """
    if labels is None:
        return list(range(count))
    wanted = labels if isinstance(labels, list) else [labels]
    if not wanted:
        raise InputError("labels is empty; give class numbers or names, or null for all classes")
    return [_number(label, names, count) for label in wanted]


def described(classes: Sequence[int], *, names: Sequence[str], count: int) -> str:
    """For people: ``class 2 = "10", class 5 = "Bag"``."""
    if list(classes) == list(range(count)) and count > _SHOWN:
        return f"all {count} classes"
    more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
    return ", ".join(f"class {_told(number, names)}" for number in classes[:_SHOWN]) + more


def _number(label: Any, names: Sequence[str], count: int) -> int:
    if not isinstance(label, int | str) or isinstance(label, bool):
        raise InputError(
            f"labels has {label!r}, which is neither a class number nor a name; "
            f"a name that reads like something else needs quotes: 'labels=[\"{_written(label)}\"]'{_known(names)}"
        )
    named = [number for number, name in enumerate(names) if name == str(label)]
    if isinstance(label, str):
        if not named:
            raise InputError(f"labels has {label!r}; give class numbers from 0 to {count - 1}, or names{_known(names)}")
        if len(named) > 1:
            raise InputError(
                f"labels has {label!r}, the name of classes {', '.join(map(str, named))}; give the number instead"
            )
    elif named and label not in named:
        if 0 <= label < count:
            raise InputError(
                f"labels has {label}, which is class {_told(label, names)} by number and class "
                f"{', '.join(_told(n, names) for n in named)} by name; give the name in quotes: "
                f"'labels=[\"{names[label] if label < len(names) else label}\"]' or 'labels=[\"{label}\"]'"
            )
    else:
        named = [label]
    if not 0 <= named[0] < count:
        raise InputError(f"labels has {label!r}; the model knows classes 0 to {count - 1}{_known(names)}")
    return named[0]


def _told(number: int, names: Sequence[str]) -> str:
    return f'{number} = "{names[number]}"' if number < len(names) else str(number)


def _written(label: Any) -> str:
    """As it may have stood on the command line."""
    return json.dumps(label) if label is None or isinstance(label, bool) else str(label)


def _known(names: Sequence[str]) -> str:
    """What there is to choose from."""
    if not names:
        return " (no names are known)"
    return f" ({', '.join(names[:20])}{', ...' if len(names) > 20 else ''})"
