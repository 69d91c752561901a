"""One value made to fit the annotation of its argument, where it can only be meant one way."""

import math
import pathlib
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn, Union, get_args, get_origin


class Misfit(Exception):
    """A value that is not of the kind."""


def fitted(value: Any, kind: Any, *, wrap: bool = True) -> Any:
    """The value as its kind has it.

    Args:
        value: plain.
        kind: an annotation; one that says nothing of plain values fits everything.
        wrap: one value may stand for a list of one.

    Raises:
        Misfit: it can not be meant.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _fitted_to_one_of(value, inner, wrap=wrap)
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    if origin is Literal:
        return _literal(value, inner)
    if _is_list(kind):
        return _list(value, origin, inner, wrap=wrap)
    if (origin or kind) in (dict, Mapping):
        return value if isinstance(value, dict) else _no()
    if _is_object(kind) and isinstance(value, (bool, int, float, str, types.NoneType)):
        return _no()
    return value


def _fitted_to_one_of(value: Any, kinds: Sequence[Any], *, wrap: bool) -> Any:
    found = []
    for kind in sorted(kinds, key=lambda kind: _ORDER.index(kind) if kind in _ORDER else len(_ORDER)):
        try:
            found.append(fitted(value, kind, wrap=wrap))
        except Misfit:
            continue
    if {int, float} <= set(kinds) and isinstance(value, float) and value > 1:
        return found[0] if found else _no()  # 100.0 steps are 100; 1.0 is a share of the whole
    exact = [each for each in found if type(each) is type(value) and each == value]
    return (exact or found or [_no])[0] if exact or found else _no()


def _no() -> NoReturn:
    raise Misfit


def _int(value: Any) -> int:
    number = _float(value)
    return int(number) if math.isfinite(number) and number == int(number) else _no()


def _float(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", value):
        value = float(value)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value else _no()


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if text not in _TRUE + _FALSE:
        _no()
    return text in _TRUE


def _str(value: Any) -> str:
    # A number with a point may have been typed in another way; a whole one was typed as it is.
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else _no()


def _none(value: Any) -> None:
    if value is not None:
        _no()


_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_SCALARS: dict[Any, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    bool: _bool,
    str: _str,
    types.NoneType: _none,
    pathlib.Path: _str,
}
_ORDER = [types.NoneType, int, float, bool, str, pathlib.Path]
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}


def _literal(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        if choice == value or str(choice) == str(value):
            return choice
    return _no()


def _list(value: Any, origin: Any, inner: Sequence[Any], *, wrap: bool) -> list[Any]:
    fixed = origin is tuple and inner and inner[-1] is not Ellipsis
    if not isinstance(value, list):
        nested = bool(inner) and _is_list(inner[0])
        value = [value] if wrap and value is not None and not isinstance(value, dict) and not nested else _no()
    if fixed and len(value) != len(inner):
        return _no()
    each = inner if fixed else [inner[0] if inner else Any] * len(value)
    return [fitted(one, kind, wrap=False) for one, kind in zip(value, each, strict=True)]


def _is_list(kind: Any) -> bool:
    return (get_origin(kind) or kind) in (list, tuple, Sequence)


def _is_object(kind: Any) -> bool:
    """Whether only a node with ``_target_`` can give it."""
    if get_origin(kind) is Callable:
        return True
    if kind is Any or not isinstance(kind, type):
        return False
    return kind.__module__ != "builtins" and not issubclass(kind, pathlib.PurePath)


def is_plain(kind: Any) -> bool:
    """Whether no node can give it."""
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return all(part in _SCALARS or get_origin(part) is Literal for part in parts)


def words(kind: Any) -> str:
    """A kind as a user calls it."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        choices = [choice for each in inner if get_origin(each) is Literal for choice in get_args(each)]
        values = [each for each in inner if get_origin(each) is not Literal and not _is_object(each)]
        others = [words(each) for each in (values if {*values} - {types.NoneType} or choices else inner)]
        return " or ".join(dict.fromkeys(([words(Literal[*choices])] if choices else []) + others))
    if origin is Literal:
        return f"one of {', '.join(dict.fromkeys(map(str, inner)))}"
    if _is_list(kind):
        if origin is tuple and Ellipsis not in inner:
            return f"a list of {len(inner)}"
        return f"a list of {_MANY[inner[0]]}" if inner and inner[0] in _MANY else "a list"
    if _is_object(kind):
        return "a node with _target_"
    return _WORDS.get(kind, "a text" if kind is pathlib.Path else "another kind of value")


def shown(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)
